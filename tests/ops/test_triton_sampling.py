"""Sampling kernels against the sampler: limits, ties, draws, and independent rows."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.steps import sampler
from lamella.ops.sampling import NO_TOKEN
from lamella.ops.sampling.triton import _uniform, sample

device = "cuda" if torch.cuda.is_available() else "cpu"

LIMITS = [  # top_k, top_p, min_p
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (300, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.01, 0.0),
    (0, 0.999, 0.0),
    (0, 1.0, 0.2),
    (0, 1.0, 1.0),
    (5, 0.7, 0.0),
    (400, 0.95, 0.01),
    (0, 0.6, 0.1),
    (10**6, 0.5, 0.0),
]


def run(logits, settings, seeds, steps, dtype=torch.float64):
    """Sample with settings (temperature, top_k, top_p, min_p) for each row."""
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    floats = (torch.tensor(values, dtype=dtype, device=device) for values in (temperature, top_p, min_p))
    temperature, top_p, min_p = floats
    x_fp32 = torch.full((logits.shape[0], logits.shape[1] + 3), torch.nan)
    x_fp32[:, :-3] = logits
    strided = x_fp32.to(device)[:, :-3]
    out = torch.full((len(logits),), -7, dtype=torch.int64, device=device)
    sample(
        strided,
        temperature,
        torch.tensor(top_k, dtype=torch.int32, device=device),
        top_p,
        min_p,
        torch.tensor(seeds, device=device),
        torch.tensor(steps, dtype=torch.int32, device=device),
        out,
    )
    assert torch.equal(strided.cpu().view(torch.int32), logits.view(torch.int32))
    return out.tolist()


def fp64_token(x, temperature, top_k, top_p, min_p, u):
    """Return one row's token in plain fp64, ranked by a stable sort."""
    x = x.double()
    ranked, order = x.sort(descending=True, stable=True)
    weights = ((ranked - ranked[0]) / temperature).exp()
    weights[weights < min_p] = 0
    if 0 < top_k < len(x):
        weights[top_k:] = 0
    if top_p < 1:
        before = weights.cumsum(0) - weights
        kept = max(1, int((before < top_p * weights.sum()).sum()))
        weights[kept:] = 0
    chances = torch.zeros_like(weights).scatter_(0, order, weights)
    sums = chances.cumsum(0).masked_fill(chances == 0, 0)
    return int((sums > u * sums.max()).to(torch.uint8).argmax())


def expected_tokens(x, setting, seed, step):
    """Return the tokens that rounding in the seventh digit allows."""
    u = sampler.uniform(seed, step)
    temperature, top_k, top_p, min_p = setting
    if temperature < 1e-5:
        return {int(x.argmax())}
    off = (1 - 1e-6, 1, 1 + 1e-6)
    return {
        fp64_token(x, temperature, top_k, top_p * a if top_p < 1 else top_p, min_p * b, min(u * c, 1 - 2**-53))
        for a, b, c in ((1, 1, 1), *((a, b, c) for a in off for b in off for c in off))
    }


def random_logits(rows, vocab, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    logits[1::3] = (logits[1::3] * 2).round() / 2  # many equal ones, -0 among them
    return logits


@pytest.mark.parametrize("vocab", [1, 50, 9001])
def test_sample(vocab):
    settings = [((0.7, 3.0)[i % 2], *limits) for i, limits in enumerate(LIMITS)]
    settings += [(0.0, 0, 1.0, 0.0), (0.0, 5, 0.3, 0.2), (0.4, 0, 1.0, 0.0), (2.0, 0, 0.9, 0.0)]
    logits = random_logits(len(settings), vocab)
    if vocab > 1:
        logits[2::4, 1::3] = logits[-2:, ::3] = -torch.inf
    seeds = [(-1) ** i * 977 * i**7 for i in range(len(settings))]
    steps = list(range(len(settings)))
    actual = run(logits, settings, seeds, steps)
    exact = 0
    for row, setting in enumerate(settings):
        allowed = expected_tokens(logits[row], setting, seeds[row], steps[row])
        assert actual[row] in allowed, setting
        exact += len(allowed) == 1
    assert exact > len(settings) / 2

    # The sampler's own plain path means the same.
    rows = [
        sampler.SamplingRow(
            params=SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m),
            seed=seed, step=step, prompt_token_ids=[], output_token_ids=[], eos_token_ids=[],
        )
        for (t, k, p, m), seed, step in zip(settings, seeds, steps, strict=True)
    ]  # fmt: skip
    tokens = sampler.sample(logits, rows).token_ids
    for row, setting in enumerate(settings):
        assert tokens[row] in expected_tokens(logits[row], setting, seeds[row], steps[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_among_few_tokens(dtype):
    """Draws of many steps among few tokens in several groups."""
    logits = torch.full((1, 5000), -torch.inf)
    ids = [3, 70, 71, 4095, 4096, 4999]
    logits[0, ids] = torch.tensor([0.2, 0.3, 0.1, 0.15, 0.2, 0.05]).log()
    rows = 4
    for limits, left in (((0, 1.0, 0.0), 6), ((4, 1.0, 0.0), 4), ((0, 0.84, 0.0), 4)):
        settings = [(1.0, *limits)] * rows
        actual = run(logits.expand(rows, -1), settings, [5] * rows, list(range(rows)), dtype)
        likely = sorted(ids, key=lambda i: (-logits[0, i].item(), i))[:left]
        assert set(actual) <= set(likely)
        for step, token in enumerate(actual):
            assert token in expected_tokens(logits[0], settings[0], 5, step)


def test_ties_at_the_cut_go_to_the_lowest_ids():
    logits = torch.zeros(3, 4200)
    logits[:, 4150] = 1.0
    logits[1] = 0.0
    logits[1, 0] = -0.0  # equals the others
    logits[2, :4] = -1.0
    kept = [[0, 1, 4150], [0, 1, 2], [4, 5, 4150]]
    # So hot that all tokens are equally likely: the nucleus, too, ends among equals.
    for seed, (top_k, top_p) in enumerate([(3, 1.0), (3, 1.0), (6, 0.45)]):
        tokens = run(logits, [(1e6, top_k, top_p, 0.0)] * 3, [seed] * 3, [2] * 3)
        assert tokens == [ids[int(sampler.uniform(seed, 2) * 3)] for ids in kept]


def test_greedy_takes_the_lowest_of_equals():
    logits = random_logits(4, 9001)
    logits[:, [17, 4095, 4096, 9000]] = 30.0
    logits[1, 17], logits[2, [17, 4095]] = 29.0, 29.0
    logits[3, [17, 4095, 4096]] = 29.0
    assert run(logits, [(0.0, 0, 1.0, 0.0)] * 4, [0] * 4, [0] * 4) == [17, 4095, 4096, 9000]


def test_rows_do_not_depend_on_one_another():
    settings = [((0.0, 0.9, 1.3)[i % 3], *LIMITS[i]) for i in range(len(LIMITS))]
    logits = random_logits(len(settings), 4200, seed=4)
    seeds = list(range(len(settings)))
    together = run(logits, settings, seeds, seeds)
    for row in range(len(settings)):
        one = slice(row, row + 1)
        assert run(logits[one], settings[one], seeds[one], seeds[one]) == together[one]


def test_a_row_without_finite_logits_gets_no_token():
    settings = [(t, *limits) for t in (0.0, 1.0) for limits in (LIMITS[0], LIMITS[2], LIMITS[4], LIMITS[8])]
    for value in (torch.nan, -torch.inf, torch.inf):
        logits = torch.full((len(settings), 5000), value)
        assert run(logits, settings, list(range(8)), [0] * 8) == [NO_TOKEN] * 8


@pytest.mark.parametrize("token", [0, 4095, 4096, 8999])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_one_bad_logit_is_detected_without_affecting_other_rows(token, value):
    settings = [(t, *limits) for t in (0.0, 1.0) for limits in (LIMITS[0], LIMITS[2], LIMITS[4], LIMITS[10])]
    logits, seeds = random_logits(len(settings), 9000), list(range(8))
    expected = run(logits, settings, seeds, seeds)
    logits[::2, token] = value
    tokens = run(logits, settings, seeds, seeds)
    assert tokens[::2] == [NO_TOKEN] * 4 and tokens[1::2] == expected[1::2]


def test_a_wide_distribution_and_extreme_temperatures():
    logits = torch.tensor([[80.0, -90.0, 79.0] + [-3e38] * 4997, [3e38, 3e38, 0.0] + [-3e38] * 4997])
    for temperature in (1e-4, 1.0, 1e4):
        for limits in LIMITS[:9:4]:
            setting = (temperature, *limits)
            for row, token in enumerate(run(logits, [setting] * 2, [9, 9], [3, 4])):
                assert token in expected_tokens(logits[row], setting, 9, 3 + row)


@triton.jit
def _uniform_kernel(seed_ptr, step_ptr, out_ptr):
    row = tl.program_id(0)
    u = _uniform(tl.load(seed_ptr + row), tl.load(step_ptr + row))
    tl.store(out_ptr + row, u)


@pytest.mark.parametrize("step_dtype", [torch.int32, torch.int64])
def test_uniform_is_the_samplers(step_dtype):
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    steps = [0, 1, 2**31 - 1, 7, 1000, 5]
    out = torch.empty(len(seeds), dtype=torch.float64, device=device)
    _uniform_kernel[(len(seeds),)](
        torch.tensor(seeds, device=device), torch.tensor(steps, dtype=step_dtype, device=device), out
    )
    assert out.tolist() == [sampler.uniform(seed, step) for seed, step in zip(seeds, steps, strict=True)]
    assert all(math.isfinite(u) for u in out.tolist())
