"""Free-running agreement, against the published procedure written out literally."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from lamella.parity.free_running import compare_generations
from lamella.parity.scores import Generation, Scores


def generation(tokens, logits, top=None):
    return Generation(tuple(tokens), Scores.from_logits(logits, tokens, top))


def make(prompts, steps, vocab, top=None, same=0.8, noise=0.5, dtype=torch.float32, seed=0):
    """Engine and reference that choose the same token with probability `same`."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(prompts):
        tokens = rng.choices(range(vocab), k=steps)
        others = [token if rng.random() < same else (token + 1) % vocab for token in tokens]
        logits = 2 * torch.randn(steps, vocab, generator=generator)
        moved = logits + noise * torch.randn(steps, 1, generator=generator).exp() * torch.randn(
            steps, vocab, generator=generator
        )
        pairs.append((generation(others, moved.to(dtype), top), generation(tokens, logits.to(dtype))))
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def literal(engine, reference):
    """(match, gap) for each prompt and step, and texts that were the same before it."""
    rows = []
    for ours, theirs in zip(engine, reference, strict=True):
        same = True
        row = []
        for step, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
            logprobs = ours.scores.logprobs[step].tolist()
            ids = range(len(logprobs)) if ours.scores.ids is None else ours.scores.ids[step].tolist()
            likeliest = sorted(zip(logprobs, ids, strict=True), reverse=True)[:20]
            gaps = [abs(logprob - theirs.scores.logprobs[step, token].item()) for logprob, token in likeliest]
            row.append((a == b, sum(gaps) / len(gaps), same))
            same = same and a == b
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    "fields",
    [
        dict(prompts=12, steps=9, vocab=50),
        dict(prompts=12, steps=9, vocab=50, top=20),
        dict(prompts=12, steps=9, vocab=50, top=33),
        dict(prompts=12, steps=9, vocab=50, top=5),
        dict(prompts=5, steps=7, vocab=20, top=20),
        dict(prompts=5, steps=7, vocab=7),
        dict(prompts=5, steps=7, vocab=7, top=20),
        dict(prompts=5, steps=7, vocab=2, top=1),
        dict(prompts=1, steps=6, vocab=30),
        dict(prompts=6, steps=1, vocab=30, same=0.5),
        dict(prompts=4, steps=40, vocab=30, same=0.95, top=20, dtype=torch.bfloat16),
        dict(prompts=4, steps=4, vocab=30, dtype=torch.float64, noise=0.01),
        dict(prompts=3, steps=5, vocab=30, noise=20.0),
    ],
)
def test_matches_the_procedure(fields):
    engine, reference = make(**fields)
    rows = literal(engine, reference)
    match, gaps, same = (np.array([[cell[i] for cell in row] for row in rows], dtype=float) for i in range(3))
    result = compare_generations(engine, reference)

    for step, position in enumerate(result.positions):
        column = gaps[:, step]
        expected = dict(
            step=step,
            n=len(rows),
            match=match[:, step].mean(),
            mean=column.mean(),
            p50=np.quantile(column, 0.5),
            p95=np.quantile(column, 0.95),
            max=column.max(),
        )
        assert position == pytest.approx(expected, rel=1e-5)
    assert len(result.positions) == fields["steps"]

    outliers = gaps > 1.0
    expected = dict(
        match=match.mean(),
        mean=gaps.mean(),
        std=gaps.std(ddof=1),
        **{f"p{percent}": np.quantile(gaps, percent / 100) for percent in (10, 50, 90, 95, 99)},
        max=gaps.max(),
        outliers=outliers.sum(),
        outlier_share=outliers.mean(),
        outliers_same_text=(outliers * same).sum(),
    )
    assert result.overall == pytest.approx(expected, rel=1e-5)
    partings = sum(before and not equal for row in rows for equal, _, before in row)
    assert result.hazard == pytest.approx(partings / sum(before for row in rows for *_, before in row))


def test_equal_generations_never_diverge():
    _, reference = make(5, 8, 40)
    result = compare_generations(reference, reference)
    assert result.hazard == 0
    assert all(position["match"] == 1 and position["max"] == 0 for position in result.positions)
    assert result.overall["match"] == 1
    assert {value for name, value in result.overall.items() if name != "match"} == {0}


def test_generations_count_for_the_hazard_only_until_they_diverge():
    engine, reference = make(5, 8, 40, same=0.0, noise=0.01)
    for ours in engine:
        ours.scores.logprobs.sub_(2)
    result = compare_generations(engine, reference)
    assert (result.hazard, result.overall["match"]) == (1, 0)
    assert [position["match"] for position in result.positions] == [0] * 8
    assert (result.overall["outliers"], result.overall["outliers_same_text"]) == (40, 5)


@pytest.mark.parametrize(
    ("equal", "hazard"),
    [
        (["111", "111"], 0),
        (["110", "111"], 1 / 6),
        (["011", "111"], 1 / 4),
        (["011", "000"], 1),  # equal tokens after a parting change nothing
        (["101", "110"], 2 / 5),
    ],
)
def test_hazard_is_divergences_divided_by_steps_at_risk(equal, hazard):
    scores = Scores.from_logits(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), [0] * 3, None)
    reference = [Generation((1, 2, 3), scores)] * len(equal)
    engine = [
        Generation(tuple(t if e == "1" else 0 for t, e in zip((1, 2, 3), row, strict=True)), scores) for row in equal
    ]
    result = compare_generations(engine, reference)
    assert result.hazard == pytest.approx(hazard)
    assert result.overall["match"] == pytest.approx("".join(equal).count("1") / (3 * len(equal)))


@pytest.mark.parametrize("vocab", [2, 19, 20, 21, 40])
def test_only_the_engines_twenty_likeliest_count(vocab):
    logprobs = -torch.arange(vocab, dtype=torch.float64)[None]
    scores = Scores(logprobs[:, 0], logprobs)
    off = torch.where(torch.arange(vocab) < 20, 0.25, 100.0)
    reference = Generation((0,), replace(scores, logprobs=logprobs - off))
    for top in (None, 20, 30):
        engine = Scores(scores.target, logprobs[:, :top], torch.arange(vocab)[None, :top]) if top else scores
        assert compare_generations([Generation((0,), engine)], [reference]).overall["mean"] == pytest.approx(0.25)


@pytest.mark.parametrize(("gap", "outliers"), [(1.0, 0), (-1.0, 0), (math.nextafter(1, 2), 1)])
def test_an_outlier_is_beyond_one_nat(gap, outliers):
    zero = torch.zeros(1, 4, dtype=torch.float64)
    engine, reference = (Generation((0,), Scores(zero[:, 0], zero + x)) for x in (gap, 0.0))
    overall = compare_generations([engine], [reference]).overall
    assert overall["outliers"] == overall["outlier_share"] == overall["outliers_same_text"] == outliers
    assert overall["std"] == 0


def test_nan_is_an_outlier():
    engine, reference = make(2, 3, 30, noise=0.01)
    engine[0].scores.logprobs[1] = math.nan
    assert compare_generations(engine, reference).overall["outliers"] > 0


@pytest.mark.parametrize("other", ["prompts", "steps"])
def test_generations_of_other_sizes_are_refused(other):
    engine, _ = make(3, 4, 10)
    _, reference = make(3 + (other == "prompts"), 4 + (other == "steps"), 10)
    with pytest.raises(ValueError, match="zip"):
        compare_generations(engine, reference)


def test_two_gaps_have_a_deviation_and_one_has_none():
    for steps, expected in ((2, True), (1, False)):
        engine, reference = make(1, steps, 30, noise=1.0)
        overall = compare_generations(engine, reference).overall
        assert (overall["std"] > 0) == expected
