"""Scores, their divergence, the statistics and the verdict, against the formulas written out plainly."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, astuple, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.parity.scores import Scores
from lamella.parity.sequences import TokenSequence
from lamella.parity.stats import Differences, compare_scores, divergence, likeliest
from lamella.parity.verdict import Tolerances, judge_stats

pytestmark = pytest.mark.unit

VOCAB = 8
SHAPES = ((80, 21),) * 20  # prompt and continuation of each sequence: 2000 predictions


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(logits):
    x = logits.double().numpy()
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def make_sequences(shapes):
    rng = random.Random(0)
    return [TokenSequence(*(tuple(rng.choices(range(VOCAB), k=count)) for count in shape)) for shape in shapes]


def make_reference(sequences, top=None):
    rows = enumerate(sequences)
    return [Scores.from_logits(3 * randn(s.num_predictions, VOCAB, seed=i), s.token_ids[1:], top) for i, s in rows]


def moved(reference, change):
    """Add `change(index)` to the forced tokens' log-probabilities."""
    return [replace(scores, target=scores.target + change(index)) for index, scores in enumerate(reference)]


def noisy(reference, sigma, seed):
    return moved(reference, lambda i: sigma * randn(len(reference[i].target), seed=1000 * seed + i))


def deltas(reference, *runs):
    """Return one array for each sequence of each run."""
    return [
        (ours.target - expected.target).numpy() for run in runs for expected, ours in zip(reference, run, strict=True)
    ]


def rms(x):
    return math.sqrt(np.mean(np.square(x)))


@cache
def case(sigma=1.0, shapes=SHAPES):
    """Sequences, reference, an engine whose noise is `sigma` times the floors', and the two floors."""
    sequences = make_sequences(shapes)
    reference = make_reference(sequences)
    return (
        sequences,
        reference,
        noisy(reference, 0.01 * sigma, 1),
        {"eager": noisy(reference, 0.01, 2), "sdpa": noisy(reference, 0.01, 3)},
    )


@cache
def compared(sigma):
    return compare_scores(*case(sigma))


# Scores


@pytest.mark.parametrize("top", [None, 1, 7, 29, 30, 31])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-6), (torch.float16, 3e-6), (torch.float64, 1e-13)]
)
def test_scores_are_log_softmax(dtype, error, top):
    logits = (4 * randn(20, 30)).to(dtype)
    tokens = random.Random(1).choices(range(30), k=20)
    expected = log_softmax(logits)
    scores = Scores.from_logits(logits, tokens, top)
    assert scores.target.dtype == torch.float64
    assert scores.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(scores.target, expected[range(20), tokens], atol=error)
    if top is None or top >= 30:
        assert scores.ids is None
        np.testing.assert_allclose(scores.logprobs, expected, atol=error)
    else:
        assert scores.ids.shape == (20, top) and scores.ids.dtype == torch.int64
        assert all(len(set(row)) == top for row in scores.ids.tolist())
        np.testing.assert_allclose(scores.logprobs, -np.sort(-expected)[:, :top], atol=error)
        np.testing.assert_allclose(scores.logprobs, np.take_along_axis(expected, scores.ids.numpy(), 1), atol=error)


def test_likeliest_is_the_largest():
    logits = randn(50, 30)
    for top in (None, 1, 5):
        assert likeliest(Scores.from_logits(logits, [0] * 50, top)).tolist() == log_softmax(logits).argmax(-1).tolist()


@pytest.mark.parametrize(
    "top",
    [None, 2],
)
def test_likeliest_is_the_first_of_equals(top):
    logits = torch.randint(0, 4, (200, 50), generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert likeliest(Scores.from_logits(logits, [0] * 200, top)).tolist() == expected


# divergence


def kl(p, q):
    """Return the textbook KL divergence of two lists of probabilities."""
    return sum(a * (math.log(a / b) if b else math.inf) for a, b in zip(p, q, strict=True) if a)


def coarse_kl(p, q, reference, engine):
    """Return the KL divergence of two distributions, coarsened to the tokens that both `Scores` list and the rest."""
    values = []
    for row, (a, b) in enumerate(zip(p, q, strict=True)):
        named = [set(range(len(a))) if s.ids is None else set(s.ids[row].tolist()) for s in (reference, engine)]
        both = sorted(named[0] & named[1])
        others = [token for token in range(len(a)) if token not in both]
        values.append(kl(*([*x[both], x[others].sum()] for x in (a, b))))
    return values


@pytest.mark.parametrize("reference_top", [None, 1, 5, 39])
@pytest.mark.parametrize("engine_top", [None, 1, 5, 8, 39])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_divergence_is_that_of_the_tokens_both_name_and_the_rest(reference_top, engine_top, dtype, error):
    logits = (2 * randn(25, 40)).to(dtype)
    other = logits + randn(25, 40, seed=1).to(dtype)
    p, q = (np.exp(log_softmax(x)) for x in (logits, other))
    reference, engine = (
        Scores.from_logits(*x) for x in ((logits, [0] * 25, reference_top), (other, [0] * 25, engine_top))
    )
    result = divergence(reference, engine)
    assert result.shape == (25,) and result.dtype == torch.float64
    np.testing.assert_allclose(result, coarse_kl(p, q, reference, engine), atol=error)
    whole = np.array([kl(*pair) for pair in zip(p, q, strict=True)])
    assert ((result.numpy() >= 0) & (result.numpy() <= whole + error)).all()
    if reference_top is None and engine_top is None:
        np.testing.assert_allclose(result, whole, atol=error)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_coarsening_never_adds_divergence(data):
    vocab = data.draw(st.integers(2, 6))
    row = st.lists(st.floats(-6, 6), min_size=vocab, max_size=vocab)
    top = st.none() | st.integers(1, vocab)
    p, q = (torch.tensor([data.draw(row)], dtype=torch.float64) for _ in range(2))
    whole, some = (
        divergence(Scores.from_logits(p, [0], a), Scores.from_logits(q, [0], b)).item()
        for a, b in ((None, None), (data.draw(top), data.draw(top)))
    )
    assert 0 <= some <= whole + 1e-8


@pytest.mark.parametrize("top", [None, 1, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_divergence_of_equals_is_zero(dtype, top):
    scores = Scores.from_logits((10 * randn(25, 20)).to(dtype), [0] * 25, top)
    assert divergence(scores, scores).tolist() == [0.0] * 25


@pytest.mark.parametrize("top", [None, 20])
def test_divergence_is_never_negative_by_rounding(top):
    logits = (3 * randn(500, 40)).float()
    scores = [Scores.from_logits(x, [0] * 500, top) for x in (logits, logits + 1e-6 * randn(500, 40, seed=1).float())]
    p, q = (s.logprobs.double() for s in scores)
    assert top or ((p.exp() * (p - q)).sum(-1) < 0).any()
    assert (divergence(*scores) >= 0).all()


def test_coarsening_never_adds_divergence_where_float32_rounds_the_rest_away():
    logits = 12 * randn(500, 200)
    other = logits + 1e-3 * randn(500, 200, seed=1)
    reference, whole = (Scores.from_logits(x.float(), [0] * 500, None) for x in (logits, other))
    assert divergence(reference, whole).max() < 3e-6
    assert divergence(reference, Scores.from_logits(other.float(), [0] * 500, 20)).max() < 3e-6


@pytest.mark.parametrize("reference_top", [None, 3])
@pytest.mark.parametrize("engine_top", [None, 3])
@pytest.mark.parametrize("both", [False, True])
def test_tokens_that_the_reference_excludes_do_not_count(reference_top, engine_top, both):
    logits, other = 0.1 * randn(10, 5), 0.1 * randn(10, 5, seed=1)
    logits[:, [1, 4]] = -math.inf
    if both:
        other[:, [1, 4]] = -math.inf
    p, q = (np.exp(log_softmax(x)) for x in (logits, other))
    result = divergence(
        Scores.from_logits(logits, [0] * 10, reference_top), Scores.from_logits(other, [0] * 10, engine_top)
    ).numpy()
    whole = np.array([kl(*pair) for pair in zip(p, q, strict=True)])
    assert ((result >= 0) & (result <= whole + 1e-12)).all()
    if both or (reference_top is None and engine_top is None):
        np.testing.assert_allclose(result, whole, atol=1e-12)


@pytest.mark.parametrize("ids", [None, torch.tensor([[2, 1, 0]])])
def test_divergence_is_infinite_if_the_engine_excludes_a_token_of_the_reference(ids):
    reference = Scores.from_logits(torch.tensor([[0.0, 1.0, 2.0, -9.0]]), [0], None if ids is None else 3)
    engine = Scores.from_logits(torch.tensor([[0.0, 1.0, -math.inf, -math.inf]]), [0], None)
    if ids is not None:
        engine = Scores(engine.target, engine.logprobs.gather(1, ids), ids)
    assert divergence(reference, engine).tolist() == [math.inf]


# Differences and Summary


@pytest.mark.parametrize(
    ("prompt", "continuation", "steps"),
    [(1, 1, [0]), (1, 4, [0, 1, 2, 3]), (3, 1, [0, 0, 0]), (3, 3, [0, 0, 0, 1, 2])],
)
def test_predictions_are_numbered_by_decode_step_and_position(prompt, continuation, steps):
    sequences = make_sequences([(prompt, continuation), (2, 2), (prompt, continuation)])
    reference = make_reference(sequences)
    result = Differences.from_scores(sequences, reference, reference)
    positions = list(range(len(steps)))
    assert result.step.tolist() == [*steps, 0, 0, 1, *steps]
    assert result.position.tolist() == [*positions, 0, 1, 2, *positions]
    assert result.sequence.tolist() == [0] * len(steps) + [1] * 3 + [2] * len(steps)


@pytest.mark.parametrize(("reference_top", "engine_top"), [(None, None), (None, 3), (3, 3), (2, None)])
def test_differences_are_engine_minus_reference(reference_top, engine_top):
    sequences = make_sequences([(4, 3), (1, 1), (2, 9)])
    logits = [2 * randn(s.num_predictions, VOCAB, seed=i) for i, s in enumerate(sequences)]
    others = [x + randn(len(x), VOCAB, seed=10 + i) for i, x in enumerate(logits)]
    reference, engine = (
        [Scores.from_logits(x, s.token_ids[1:], top) for x, s in zip(rows, sequences, strict=True)]
        for rows, top in ((logits, reference_top), (others, engine_top))
    )
    result = Differences.from_scores(sequences, reference, engine)
    p, q = (log_softmax(torch.cat(rows)) for rows in (logits, others))
    tokens = [token for s in sequences for token in s.token_ids[1:]]
    rows = range(len(tokens))
    ordered = np.sort(p)
    np.testing.assert_allclose(result.delta, q[rows, tokens] - p[rows, tokens], atol=1e-12)
    np.testing.assert_allclose(result.margin, ordered[:, -1] - ordered[:, -2], atol=1e-12)
    assert result.flipped.tolist() == (p.argmax(1) != q.argmax(1)).tolist()
    assert {True, False} == set(result.flipped.tolist())
    np.testing.assert_allclose(
        result.kl, torch.cat([divergence(*pair) for pair in zip(reference, engine, strict=True)])
    )
    mask = result.step > 0
    for ours, column in zip(astuple(result.where(mask)), astuple(result), strict=True):
        assert ours.tolist() == [x for x, keep in zip(column.tolist(), mask.tolist(), strict=True) if keep]


@pytest.mark.parametrize("count", [1, 2, 3, 11, 999, 1001])
def test_summary_is_the_usual_statistics(count):
    delta, margin = randn(count) + 0.1, randn(count, seed=1).abs()
    divergences, flipped = randn(count, seed=2).square(), randn(count, seed=3) > 0.5
    tie = 0.7
    margin[0], flipped[0] = tie, True
    zeros = torch.zeros(count, dtype=torch.int64)
    result = Differences(delta, divergences, flipped, margin, zeros, zeros, zeros).summary(tie)
    x, size = delta.numpy(), delta.abs().numpy()
    error = math.sqrt(((x - x.mean()) ** 2).sum() / (count - 1) / count) if count > 1 else math.nan
    near = sum(f and m < tie for f, m in zip(flipped.tolist(), margin.tolist(), strict=True))
    expected = dict(
        n=count,
        bias=x.mean(),
        bias_error=error,
        rms=rms(x),
        **{f"p{digits}": np.quantile(size, float(f"0.{digits}")) for digits in ("90", "95", "99", "999")},
        p50=np.quantile(size, 0.5),
        max=size.max(),
        kl_mean=divergences.numpy().mean(),
        kl_max=divergences.numpy().max(),
        agreement=1 - flipped.numpy().mean(),
        flips=flipped.sum().item(),
        near_tie_flips=near,
    )
    assert asdict(result) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert isinstance(result.flips, int) and isinstance(result.near_tie_flips, int)


@pytest.mark.parametrize(
    ("margin", "near"), [(0.0, 1), (math.nextafter(0.5, 0), 1), (0.5, 0), (math.nextafter(0.5, 1), 0), (math.nan, 0)]
)
@pytest.mark.parametrize("flipped", [True, False])
def test_a_near_tie_is_a_flip_below_the_margin(margin, near, flipped):
    one = torch.zeros(1, dtype=torch.float64)
    result = Differences(one, one, torch.tensor([flipped]), one + margin, one, one, one).summary(0.5)
    assert (result.flips, result.near_tie_flips) == (int(flipped), near * int(flipped))


# compare_scores


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_ratio_is_that_of_the_noise_within_its_own_error(sigma):
    sequences, reference, engine, floors = case(sigma)
    result = compare_scores(sequences, reference, engine, floors)
    ours, noise = (np.abs(np.concatenate(deltas(reference, *runs))) for runs in ((engine,), floors.values()))
    assert result.noise_floor_ratio == pytest.approx(rms(ours) / rms(noise))
    assert result.p999_ratio == pytest.approx(np.quantile(ours, 0.999) / np.quantile(noise, 0.999))
    assert abs(result.noise_floor_ratio - sigma) < 4 * result.noise_floor_ratio_error
    # What theory says of Gaussian noise: var(rms) = sigma^2 / 2n, and the floor has twice the predictions.
    assert result.noise_floor_ratio_error == pytest.approx(sigma * math.sqrt(1 / 4000 + 1 / 8000), rel=0.4)


@pytest.mark.parametrize("shapes", [((5, 6),) * 3, ((1, 1), (9, 4), (2, 30), (1, 2)), ((3, 3), (4, 4))])
def test_ratio_error_leaves_one_sequence_out_at_a_time(shapes):
    sequences, reference, engine, floors = case(2.0, shapes)
    ours, noise = deltas(reference, engine), [deltas(reference, floor) for floor in floors.values()]
    values = []
    for left_out in range(len(shapes)):
        kept = [i for i in range(len(shapes)) if i != left_out]
        values.append(
            rms(np.concatenate([ours[i] for i in kept])) / rms(np.concatenate([f[i] for f in noise for i in kept]))
        )
    expected = math.sqrt((len(values) - 1) * np.var(values))
    result = compare_scores(sequences, reference, engine, floors)
    assert result.noise_floor_ratio_error == pytest.approx(expected)


def test_the_ratio_error_needs_two_sequences():
    result = compare_scores(*case(2.0, ((3, 4),)))
    assert math.isnan(result.noise_floor_ratio_error) and result.noise_floor_ratio > 0


def test_an_exact_engine_has_ratio_zero():
    sequences, reference, _, floors = case()
    result = compare_scores(sequences, reference, reference, floors)
    assert (result.noise_floor_ratio, result.noise_floor_ratio_error, result.p999_ratio) == (0, 0, 0)
    assert (result.engine.rms, result.engine.max, result.engine.kl_max, result.engine.agreement) == (0, 0, 0, 1)
    assert result.outliers["count"] == result.slope["per_step"] == 0
    for dtype in (torch.float32, torch.bfloat16):
        assert judge_stats(result, dtype, Tolerances()) == []


@pytest.mark.parametrize("bias", [-0.005, 0.002])
def test_a_bias_is_found(bias):
    sequences, reference, engine, floors = case()
    result = compare_scores(sequences, reference, moved(engine, lambda i: bias), floors).engine
    assert abs(result.bias - bias) < 4 * result.bias_error
    assert result.bias_error == pytest.approx(0.01 / math.sqrt(2000), rel=0.1)


def test_phases_and_steps_have_their_own_summaries():
    sequences, reference, engine, floors = case(2.0, ((5, 4), (2, 6), (1, 1)))
    result = compare_scores(sequences, reference, engine, floors)
    by_step: dict[int, list[float]] = {}
    for sequence, delta in zip(sequences, deltas(reference, engine), strict=True):
        for prediction, value in enumerate(delta.tolist()):
            by_step.setdefault(max(0, prediction + 1 - len(sequence.prompt)), []).append(value)
    decode = [value for step, values in by_step.items() if step for value in values]
    for summary, values in ((result.engine_prefill, by_step[0]), (result.engine_decode, decode)):
        assert (summary.n, summary.rms) == (len(values), pytest.approx(rms(values)))
    assert result.engine.n == len(decode) + len(by_step[0])
    assert [(p["step"], p["n"]) for p in result.positions] == [(step, len(by_step[step])) for step in sorted(by_step)]
    assert [p["bias"] for p in result.positions] == pytest.approx([np.mean(by_step[s]) for s in sorted(by_step)])
    assert set(result.floor) == set(floors)
    for name, floor in floors.items():
        assert result.floor[name].rms == pytest.approx(rms(np.concatenate(deltas(reference, floor))))
    assert compare_scores(*case(1.0, ((5, 1), (1, 1)))).engine_decode is None


def test_a_near_tie_is_measured_in_the_floors_rms():
    sequences = make_sequences([(1, 1)] * 3)
    zero = torch.zeros(1, dtype=torch.float64)
    reference = [Scores(zero, torch.tensor([[0.0, margin]], dtype=torch.float64)) for margin in (0.1, 0.42, 0.43)]
    engine = [replace(scores, logprobs=scores.logprobs.flip(1)) for scores in reference]
    floors = {
        "eager": moved(reference, lambda i: 0.1),
        "sdpa": moved(reference, lambda i: -0.1),
    }  # 3 sqrt(2) 0.1 = 0.424
    result = compare_scores(sequences, reference, engine, floors).engine
    assert (result.flips, result.near_tie_flips) == (3, 2)


def test_a_slope_in_the_decode_steps_is_found_within_its_error():
    sequences, reference, _, floors = case()
    steps = [np.maximum(0, np.arange(s.num_predictions) + 1 - len(s.prompt)) for s in sequences]
    signs = [(-1.0) ** np.arange(len(s)) for s in steps]
    engine = moved(
        reference, lambda i: torch.tensor(signs[i] * (0.5 + 0.003 * steps[i])) + 0.05 * randn(len(steps[i]), seed=i)
    )
    slope = compare_scores(sequences, reference, engine, floors).slope
    x, y = (np.concatenate(values) for values in (steps, deltas(reference, engine)))
    x, y = x[x > 0], np.abs(y[x > 0])
    design = np.stack((x, np.ones_like(x)), 1)
    fit, (left,), *_ = np.linalg.lstsq(design.astype(float), y, rcond=None)
    error = math.sqrt(left / (len(x) - 2) * np.linalg.inv(design.T @ design)[0, 0])
    assert slope == pytest.approx({"per_step": fit[0], "standard_error": error})
    assert abs(slope["per_step"] - 0.003) < 4 * slope["standard_error"] < 0.003


@pytest.mark.parametrize(("continuation", "some"), [(1, False), (2, False), (3, False), (4, True)])
def test_a_slope_needs_three_decode_steps(continuation, some):
    slope = compare_scores(*case(1.0, ((2, continuation), (2, 1)))).slope
    assert (slope is not None) is some
    assert not some or all(map(math.isfinite, slope.values()))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_outliers_are_those_beyond_twice_the_floors_worst(count):
    sequences, reference, _, floors = case()
    limit = 2 * np.abs(np.concatenate(deltas(reference, *floors.values()))).max()

    def plant(index):
        x = torch.zeros_like(reference[index].target)
        x[index] = 0.999 * limit
        x[20] = (-1) ** index * 1.001 * limit * (index < count)
        return x

    result = compare_scores(sequences, reference, moved(reference, plant), floors)
    assert result.outliers == pytest.approx({"limit": limit, "count": count, "share": count / 2000})


@pytest.mark.parametrize("shapes", [((1, 1),), ((5, 3), (1, 1)), ((20, 5),), ((20, 6),), ((90, 40), (3, 2)), SHAPES])
def test_the_curve_covers_every_position_once(shapes):
    sequences, reference, engine, floors = case(3.0, shapes)
    bins = compare_scores(sequences, reference, engine, floors).curve
    longest = max(sum(shape) for shape in shapes) - 1
    assert [position for b in bins for position in range(b["start"], b["stop"])] == list(range(longest))
    assert len(bins) == min(24, longest)
    for b in bins:
        ours, *noise = (
            np.concatenate([x[b["start"] : b["stop"]] for x in deltas(reference, s)])
            for s in (engine, *floors.values())
        )
        assert b["engine_rms"] == pytest.approx(rms(ours))
        assert b["floor_rms"] == pytest.approx(rms(np.concatenate(noise)))


@pytest.mark.parametrize(
    ("engine", "floors"),
    [
        (1.0, (0.5, 0.7)),
        (1e-9, (1.0,)),
        (0.0, (1.0, 2.0, 3.0)),
        (1.0, (0.0, 0.0)),
        (0.0, (0.0, 0.0)),
        (math.nan, (1.0, 1.0)),
        (math.inf, (1.0, 1.0)),
    ],
)
def test_the_histogram_counts_every_prediction(engine, floors):
    sequences, reference, *_ = case(1.0, ((9, 8),) * 5)
    # An amplitude of 0 is no difference at all; one that is not finite meets a single prediction.
    ours = noisy(reference, engine if math.isfinite(engine) else 1.0, 1)
    if not math.isfinite(engine):
        ours[0].target[3] = engine
    noise = {str(i): noisy(reference, sigma, 2 + i) for i, sigma in enumerate(floors)}
    histogram = compare_scores(sequences, reference, ours, noise).histogram
    edges = np.array(histogram["edges"])
    assert len(edges) - 1 == len(histogram["engine"]) == len(histogram["floor"])
    assert (np.diff(edges) > 0).all()
    assert sum(histogram["engine"]) == sum(s.num_predictions for s in sequences)
    assert sum(histogram["floor"]) == pytest.approx(sum(s.num_predictions for s in sequences))
    for counts, runs in ((histogram["engine"], [ours]), (histogram["floor"], noise.values())):
        sizes = np.abs(np.concatenate(deltas(reference, *runs)))
        places = np.digitize(sizes[np.isfinite(sizes)], edges[1:-1])
        expected = np.bincount(places, minlength=len(counts)).astype(float)
        expected[-1] += (~np.isfinite(sizes)).sum()
        assert counts == pytest.approx((expected / len(runs)).tolist())


def test_a_histogram_of_equal_differences_counts_them_all():
    sequences, reference, *_ = case(1.0, ((9, 8),) * 5)
    reference = [replace(scores, target=torch.zeros_like(scores.target)) for scores in reference]
    engine = moved(reference, lambda i: 0.3)
    histogram = compare_scores(sequences, reference, engine, {"eager": engine, "sdpa": engine}).histogram
    assert sum(histogram["engine"]) == sum(histogram["floor"]) == 80


@pytest.mark.parametrize("count", [0, 1, 12, 10**6])
@pytest.mark.parametrize("top", [None, 3])
def test_worst_are_the_largest_in_order(count, top):
    sequences = make_sequences([(4, 6), (1, 1), (12, 3), (1, 5)])
    reference = make_reference(sequences, top)
    engine = [
        replace(ours, target=expected.target + randn(len(expected.target), seed=90 + i))
        for i, (ours, expected) in enumerate(zip(make_reference(sequences[::-1], top)[::-1], reference, strict=True))
    ]
    engine = [
        replace(e, logprobs=t.logprobs.flip(1), ids=t.ids if top is None else t.ids.flip(1))
        for e, t in zip(engine, reference, strict=True)
    ]
    rows = []
    for number, sequence in enumerate(sequences):
        tokens = sequence.prompt + sequence.continuation
        for at in range(1, len(tokens)):
            step = at - len(sequence.prompt)
            logprob, given = reference[number].target[at - 1].item(), engine[number].target[at - 1].item()
            rows.append(
                dict(
                    sequence=number,
                    position=at,
                    phase=f"decode {step}" if step > 0 else "prefill",
                    token=tokens[at],
                    context_ids=list(tokens[:at][-8:]),
                    reference_logprob=logprob,
                    engine_logprob=given,
                    delta=given - logprob,
                    reference_top=likeliest(reference[number])[at - 1].item(),
                    engine_top=likeliest(engine[number])[at - 1].item(),
                )
            )
    rows.sort(key=lambda row: -abs(row["delta"]))
    result = compare_scores(sequences, reference, engine, {"eager": noisy(reference, 0.1, 5)}, worst=count)
    assert result.worst == rows[:count]


def test_nan_is_the_worst_prediction():
    sequences, reference, engine, floors = case()
    engine = moved(engine, lambda i: 0.0)
    engine[5].target[7], engine[3].target[85] = math.nan, -math.inf
    first, second, *_ = compare_scores(sequences, reference, engine, floors).worst
    assert (first["sequence"], first["position"], first["phase"]) == (5, 8, "prefill")
    assert (second["sequence"], second["position"], second["phase"]) == (3, 86, "decode 6")


# judge_stats


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("floor", ["noise", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_with_nan_never_passes(value, floor, dtype):
    sequences, reference, _, floors = case()
    engine = moved(reference, lambda i: 0.0)
    engine[5].target[7] = value
    result = compare_scores(sequences, reference, engine, floors if floor == "noise" else {"eager": reference})
    assert not result.noise_floor_ratio < math.inf
    assert result.outliers["count"] == 1
    assert judge_stats(result, dtype, Tolerances())


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        -math.inf,
    ],
)
def test_a_floor_with_nan_is_not_used_as_yardstick(value):
    sequences, reference, engine, floors = case(500.0, ((5, 6),) * 3)
    floor = moved(reference, lambda i: 0.0)
    floor[1].target[7] = value
    result = compare_scores(sequences, reference, engine, {"eager": floor, "sdpa": floors["sdpa"]})
    assert judge_stats(result, torch.bfloat16, Tolerances())


def test_a_zero_floor_allows_nothing_but_equality():
    sequences, reference, engine, _ = case()
    floors = {"eager": reference, "sdpa": reference}
    result = compare_scores(sequences, reference, engine, floors)
    assert (result.noise_floor_ratio, result.p999_ratio) == (math.inf, math.inf)
    assert result.outliers == {"limit": 0, "count": 2000, "share": 1}
    assert len(judge_stats(result, torch.bfloat16, Tolerances())) >= 3
    exact = compare_scores(sequences, reference, reference, floors)
    assert (exact.noise_floor_ratio, exact.p999_ratio, exact.outliers["count"]) == (0, 0, 0)
    assert judge_stats(exact, torch.bfloat16, Tolerances()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sigma", "passes"), [(0.5, True), (1.0, True), (1.2, False), (3.0, False)])
def test_noise_up_to_that_of_the_floor_passes(sigma, passes, dtype):
    assert (judge_stats(compared(sigma), dtype, Tolerances()) == []) is passes


def changed(**changes):
    """Return a passing comparison with some values changed; names with `engine_` belong to the engine's summary."""
    result = compared(0.9)
    engine = {name.removeprefix("engine_"): changes.pop(name) for name in list(changes) if name.startswith("engine_")}
    share = changes.pop("share", 0.0)
    floor = {
        name: replace(summary, rms=rms) for (name, summary), rms in zip(result.floor.items(), (0.01, 0.02), strict=True)
    }
    outliers = {**result.outliers, "count": 5, "share": share}
    fields = dict(noise_floor_ratio=0.9, noise_floor_ratio_error=0.01, p999_ratio=1.1, floor=floor, outliers=outliers)
    return replace(result, **{**fields, "engine": replace(result.engine, **engine), **changes})


def above(x):
    return math.nextafter(x, math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), None),
        (dict(noise_floor_ratio=1.0, noise_floor_ratio_error=0.0), None),
        (dict(noise_floor_ratio=above(1.0), noise_floor_ratio_error=0.0), "rms error"),
        (dict(noise_floor_ratio=1.25, noise_floor_ratio_error=0.125), None),
        (dict(noise_floor_ratio=above(1.25), noise_floor_ratio_error=0.125), "rms error"),
        (dict(noise_floor_ratio=1.5, noise_floor_ratio_error=9.0), None),
        (dict(noise_floor_ratio=above(1.5), noise_floor_ratio_error=9.0), "rms error"),
        (dict(noise_floor_ratio=1.25, noise_floor_ratio_error=math.nan), None),
        (dict(noise_floor_ratio=above(1.25), noise_floor_ratio_error=math.nan), "rms error"),
        (dict(noise_floor_ratio=math.nan), "rms error"),
        (dict(noise_floor_ratio=math.inf, noise_floor_ratio_error=math.nan), "rms error"),
        (dict(p999_ratio=2.0), None),
        (dict(p999_ratio=above(2.0)), "99.9th percentile"),
        (dict(p999_ratio=math.nan), "99.9th percentile"),
        (dict(engine_bias=0.5, engine_bias_error=0.125), None),
        (dict(engine_bias=-0.5, engine_bias_error=0.125), None),
        (dict(engine_bias=above(0.5), engine_bias_error=0.125), "bias"),
        (dict(engine_bias=-above(0.5), engine_bias_error=0.125), "bias"),
        (dict(engine_bias=0.005, engine_bias_error=1e-9), None),
        (dict(engine_bias=-0.005, engine_bias_error=math.nan), None),
        (dict(engine_bias=above(0.005), engine_bias_error=1e-9), "bias"),
        (dict(engine_bias=-above(0.005), engine_bias_error=math.nan), "bias"),
        (dict(engine_bias=math.nan), "bias"),
        (dict(share=0.001), None),
        (dict(share=above(0.001)), "outliers"),
        (dict(share=math.nan), "outliers"),
    ],
)
def test_every_tolerance_holds_up_to_its_limit(changes, reason, dtype):
    reasons = judge_stats(changed(**changes), dtype, Tolerances())
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


@pytest.mark.parametrize(
    ("tolerances", "changes"),
    [
        (dict(ratio=0.5, ratio_at_most=0.5), dict(noise_floor_ratio=0.6)),
        (dict(ratio_at_most=1.1), dict(noise_floor_ratio=1.2, noise_floor_ratio_error=1.0)),
        (dict(p999_ratio=1.0), dict(p999_ratio=1.5)),
        (dict(bias=0.1), dict(engine_bias=0.004, engine_bias_error=1e-9)),
        (dict(outlier_share=0.0), dict(share=0.0005)),
        (dict(exact=0.0), dict(engine_max=1e-5, p999_ratio=3.0)),
    ],
)
def test_tolerances_can_be_tightened(tolerances, changes):
    defaults = Tolerances()
    assert judge_stats(changed(**changes), torch.float32, defaults) == []
    assert len(judge_stats(changed(**changes), torch.float32, replace(defaults, **tolerances))) == 1


def test_a_larger_ratio_can_be_allowed():
    assert judge_stats(changed(noise_floor_ratio=1.9), torch.bfloat16, Tolerances(ratio=2.0)) == []


@pytest.mark.parametrize(
    ("dtype", "size", "passes"),
    [
        (torch.float32, 1e-4, True),
        (torch.float32, above(1e-4), False),
        (torch.float32, math.nan, False),
        (torch.float32, math.inf, False),
        (torch.bfloat16, 1e-4, False),
        (torch.float16, 1e-4, False),
    ],
)
def test_small_differences_pass_without_yardstick_only_in_fp32(dtype, size, passes):
    awful = changed(engine_max=size, engine_bias=9.0, noise_floor_ratio=9.0, p999_ratio=9.0, share=0.9)
    assert len(judge_stats(awful, dtype, Tolerances())) == (0 if passes else 4)


def test_a_constant_bias_is_a_reason():
    sequences = make_sequences([(1, 1), (1, 1)])
    reference = [
        replace(scores, target=torch.full((1,), -1.0, dtype=torch.float64)) for scores in make_reference(sequences)
    ]
    result = compare_scores(
        sequences, reference, moved(reference, lambda i: -0.5), {"eager": noisy(reference, 0.01, 1)}
    )
    assert result.engine.bias == -0.5 and result.engine.bias_error == 0
    assert any("bias" in reason for reason in judge_stats(result, torch.bfloat16, Tolerances()))
