import math
import random
from unittest import mock

import pytest
import torch

from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.steps import sampler
from lamella.engine.steps.sampler import SamplingRow, process_logits, prompt_logprobs, sample, uniform
from lamella.ops.sampling import NO_TOKEN

pytestmark = pytest.mark.unit

VOCAB = 37


def reference(logits, row):
    """Return token and distribution of one row, computed in plain Python on lists."""
    params, x = row.params, [float(v) for v in logits.float()]
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if row.step < params.min_tokens:
        for token in [*row.eos_token_ids, *(params.stop_token_ids or [])]:
            x[token] = -math.inf
    for token in range(len(x)):
        count = row.output_token_ids.count(token)
        if count or token in row.prompt_token_ids:
            scale = params.repetition_penalty
            x[token] = x[token] / scale if x[token] > 0 else x[token] * scale
        x[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    x = torch.tensor(x, dtype=torch.float32).tolist()
    ranking = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.temperature == 0:
        return ranking[0], None
    peak = x[ranking[0]]
    weights = [math.exp((v - peak) / params.temperature) for v in x]
    weights = [w if w >= params.min_p else 0.0 for w in weights]
    if params.top_k > 0:
        for token in ranking[params.top_k :]:
            weights[token] = 0.0
    total, mass = sum(weights), 0.0
    for token in ranking:
        if params.top_p < 1 and mass >= params.top_p * total:
            weights[token] = 0.0
        mass += weights[token]
    target, total = uniform(row.seed, row.step) * sum(weights), 0.0
    for token, weight in enumerate(weights):
        total += weight
        if total > target:
            return token, [w / sum(weights) for w in weights]
    raise AssertionError("no token")


def random_row(rng, **fields):
    choice = rng.choice
    params = dict(
        temperature=choice([0, 0.3, 1.0, 2.5]),
        top_p=choice([1.0, 0.9, 0.3, 1e-6]),
        top_k=choice([0, -1, 1, 2, 7, VOCAB, 100]),
        min_p=choice([0.0, 0.05, 1.0]),
        min_tokens=choice([0, 3]),
        stop_token_ids=choice([None, [3, 5]]),
        repetition_penalty=choice([1.0, 1.3, 0.7]),
        presence_penalty=choice([0.0, 0.5]),
        frequency_penalty=choice([0.0, -0.25]),
        logit_bias=choice([None, {0: 2.5, 9: -100}]),
        logprobs=choice([None, None, 0, 4]),
    )
    length = rng.randrange(6)
    tokens = [rng.randrange(VOCAB) for _ in range(10 + length)]
    return SamplingRow(
        SamplingParams(**{**params, **fields}), rng.randrange(2**63), length, tokens[:10], tokens[10:], {1}
    )


def plain_row(step=0, seed=0, **fields):
    return SamplingRow(SamplingParams(**fields), seed, step, [], [], set())


def random_logits(rng, rows, dtype=torch.float32):
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * 3
    logits[:, rng.randrange(6, VOCAB)] = -math.inf
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", [sampler._MAX_LOGITS, 3 * VOCAB])
def test_matches_reference(dtype, block):
    rng = random.Random(f"{dtype}{block}")
    with mock.patch.object(sampler, "_MAX_LOGITS", block):
        for _ in range(25):
            rows = [random_row(rng) for _ in range(12)]
            logits = random_logits(rng, len(rows), dtype)
            before = logits.clone()
            result = sample(logits, rows)
            assert torch.equal(logits, before)
            assert result.token_ids == [reference(x, row)[0] for x, row in zip(logits, rows, strict=True)]
            for x, row, token, entry in zip(logits, rows, result.token_ids, result.logprobs, strict=True):
                assert (entry is None) == (row.params.logprobs is None)
                if entry is not None:
                    check_logprobs(entry, x, token, row.params.logprobs)


def check_logprobs(entry, logits, token, k):
    expected = torch.log_softmax(logits.float(), -1)
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-5)
    ranks = [1 + int((expected > v).sum()) for v in expected]
    assert entry.rank == ranks[token]
    assert len(set(entry.top_ids)) == len(entry.top_logprobs) == k
    assert entry.top_logprobs == pytest.approx(expected.sort(descending=True).values[:k].tolist(), abs=1e-5)
    assert entry.top_logprobs == pytest.approx(expected[entry.top_ids].tolist(), abs=1e-5)
    assert entry.top_ranks == [ranks[i] for i in entry.top_ids]


def test_batch_and_order_do_not_matter():
    rng = random.Random(1)
    rows = [random_row(rng, temperature=rng.choice([0, 1.0])) for _ in range(40)]
    logits = random_logits(rng, len(rows))
    result = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [row]) for i, row in enumerate(rows)]
    assert result.token_ids == [one.token_ids[0] for one in alone]
    order = rng.sample(range(len(rows)), len(rows))
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled.token_ids == [result.token_ids[i] for i in order]
    assert [e and e.rank for e in shuffled.logprobs] == [e and e.rank for e in (result.logprobs[i] for i in order)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_the_first_argmax(dtype):
    logits = torch.randint(0, 5, (20, VOCAB), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [row.index(max(row)) for row in logits.tolist()]
    for fields in (dict(temperature=0), dict(temperature=0, logprobs=1), dict(top_k=1), dict(top_p=1e-9)):
        assert sample(logits, [plain_row(seed=i, **fields) for i in range(20)]).token_ids == expected
    assert sample(logits[:0], []).token_ids == []


def test_ties_leave_exactly_k_tokens_of_lowest_id():
    logits = torch.zeros(1, VOCAB)
    for fields, count in ((dict(top_k=5), 5), (dict(top_p=5.5 / VOCAB), 6), (dict(top_k=10, top_p=0.45), 5)):
        seen = {sample(logits, [plain_row(step, **fields)]).token_ids[0] for step in range(200)}
        assert seen == set(range(count))


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(temperature=0.7, top_k=6),
        dict(top_p=0.8),
        dict(min_p=0.1),
        dict(temperature=2, top_k=20, top_p=0.9),
    ],
)
def test_draws_follow_the_distribution(fields):
    draws = 8_000
    logits = random_logits(random.Random(5), 1)
    rows = [plain_row(step % 100, seed=step // 100, **fields) for step in range(draws)]
    counts = torch.bincount(torch.tensor(sample(logits.expand(draws, -1), rows).token_ids), minlength=VOCAB)
    expected = torch.tensor(reference(logits[0], rows[0])[1]) * draws
    assert (counts[expected == 0] == 0).all()
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum())
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("fields", [dict(), dict(top_k=3), dict(top_p=0.999), dict(temperature=1e-4)])
def test_impossible_tokens_are_never_drawn(u, fields):
    logits = torch.full((3, 1000), -math.inf)
    logits[0, [400, 401, 700]] = torch.tensor([1.0, 2.0, 3.0])
    logits[1, 500] = -1e30
    logits[2, 1::2] = torch.randn(500, generator=torch.Generator().manual_seed(2))
    with mock.patch.object(sampler, "uniform", return_value=u):
        tokens = sample(logits, [plain_row(**fields)] * 3).token_ids
    assert all(math.isfinite(logits[i, token]) for i, token in enumerate(tokens))


EVERY_CHOICE = [dict(), dict(temperature=0), dict(top_k=2), dict(top_p=0.5), dict(temperature=1e-4, logprobs=2)]


@pytest.mark.parametrize("fields", EVERY_CHOICE)
def test_extreme_rows_stay_in_the_vocabulary(fields):
    (token,) = sample(torch.tensor([[3e38, -3e38] * 4]), [plain_row(**fields)]).token_ids
    assert 0 <= token < 8


@pytest.mark.parametrize("edited", [dict(), dict(logit_bias={1: 2.0}), dict(repetition_penalty=1.5)])
@pytest.mark.parametrize("fields", EVERY_CHOICE)
def test_a_row_without_finite_logits_gets_no_token(fields, edited):
    good = torch.randn(8, generator=torch.Generator().manual_seed(3))
    rows = [good.clone() for _ in range(5)]
    rows[1][5], rows[2][0], rows[3][:] = math.nan, math.inf, -math.inf
    rows[4][:7] = -math.inf  # legal: one token is left
    tokens = sample(torch.stack(rows), [plain_row(**fields, **edited)] * 5).token_ids
    alone = sample(good[None], [plain_row(**fields, **edited)]).token_ids
    assert tokens == [*alone, NO_TOKEN, NO_TOKEN, NO_TOKEN, 7]


def test_masked_nan_is_still_detected():
    logits = torch.tensor([[0.0, math.nan, 1.0, math.inf]])
    for ids in ([1], [3], [1, 3]):
        params = SamplingParams(min_tokens=2, stop_token_ids=ids, temperature=0)
        assert sample(logits, [SamplingRow(params, 0, 0, [], [], [])]).token_ids == [NO_TOKEN]


def test_parameters_that_forbid_every_token_give_none():
    params = SamplingParams(min_tokens=2, stop_token_ids=[0, 1, 2], temperature=0)
    assert sample(torch.zeros(1, 3), [SamplingRow(params, 0, 0, [], [], [])]).token_ids == [NO_TOKEN]


def test_min_tokens_forbids_end_tokens():
    logits = torch.zeros(1, 8)
    logits[0, 2:4] = 50
    params = SamplingParams(min_tokens=2, stop_token_ids=[3], temperature=0)
    for step, expected in ((0, 0), (1, 0), (2, 2)):
        assert sample(logits, [SamplingRow(params, 0, step, [], [], [2, 99])]).token_ids == [expected]


def test_penalties_ignore_ids_beyond_the_logits():
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    row = SamplingRow(params, 0, 0, [-1, 3, 8, 10**6], [], [])
    assert sample(torch.tensor([[0.0, 1.5, 0, 2, 0, 0, 0, 0]]), [row]).token_ids == [1]


def test_uniform_depends_on_seed_and_step():
    values = [uniform(seed, step) for seed in (-1, 0, 1, 2**63 - 1) for step in range(500)]
    assert len(set(values)) == 2000 and all(0 <= u < 1 for u in values)
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)
    assert uniform(7, 3) == uniform(7, 3)
    assert uniform(0, 0) == 0.6524484863740322  # requests stay reproducible across versions


@pytest.mark.parametrize("block", [sampler._MAX_LOGITS, 2 * VOCAB])
def test_prompt_logprobs(block):
    logits = random_logits(random.Random(3), 7, torch.bfloat16)
    targets = torch.arange(7)
    with mock.patch.object(sampler, "_MAX_LOGITS", block):
        for k in (0, 1, 5):
            entries = prompt_logprobs(logits, targets, k)
            assert len(entries) == 7
            for entry, x, target in zip(entries, logits, targets, strict=True):
                check_logprobs(entry, x, int(target), k)
    assert prompt_logprobs(logits[:0], targets[:0], 2) == []


def test_as_dict_holds_the_sampled_token_first():
    (entry,) = prompt_logprobs(torch.tensor([[0.0, 1.0, 1.0, 3.0]]), torch.tensor([2]), 3)
    entries = entry.as_dict(str)
    assert next(iter(entries)) == 2 and set(entries) == {1, 2, 3}
    assert [(entries[i].rank, entries[i].decoded_token) for i in (3, 1, 2)] == [(1, "3"), (2, "1"), (2, "2")]


def test_top_p_keeps_exactly_its_mass():
    """Half of the mass of equally likely tokens is exactly half of the tokens."""
    logits = torch.zeros(1, 8)
    rows = [row_of(SamplingParams(top_p=0.5, seed=seed), seed) for seed in range(200)]
    drawn = set(sample(logits.expand(200, -1), rows).token_ids)
    assert drawn == {0, 1, 2, 3}


def test_frequency_counts_every_occurrence_and_presence_one():
    logits = torch.zeros(1, 4)
    for params, output, expected in (
        (SamplingParams(frequency_penalty=0.5), [1, 1, 1, 2], [0.0, -1.5, -0.5, 0.0]),
        (SamplingParams(presence_penalty=0.5), [1, 1, 1, 2], [0.0, -0.5, -0.5, 0.0]),
        (SamplingParams(frequency_penalty=0.5, presence_penalty=0.25), [3, 3], [0.0, 0.0, 0.0, -1.25]),
    ):
        row = SamplingRow(params, 0, len(output), [0], output, ())
        assert process_logits(logits, [row])[0].tolist() == expected


def row_of(params: SamplingParams, seed: int) -> SamplingRow:
    return SamplingRow(params, seed, 0, [0], [], ())
