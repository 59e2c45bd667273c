"""Statistics of teacher-forced log-probabilities: the engine's error compared with the noise floor.

All differences are of natural log-probabilities, engine minus reference. The noise floor is the error of the reference
itself when it computes in the engine's dtype, with two implementations of attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lamella.parity.scores import Scores
from lamella.parity.sequences import TokenSequence

# A flip of the likeliest token is a near-tie if the reference's margin is below this many floor rms. This is three
# standard deviations of the difference of two errors of that size.
NEAR_TIE = 3 * math.sqrt(2)
# An outlier differs by more than this factor times the largest error of the floor.
OUTLIER = 2.0
_BINS = 24
# Accuracy of "1 minus the sum of float32 probabilities".
_LEAST_REST = 1e-6


@dataclass(frozen=True)
class Summary:
    """Summary of the differences over a set of predictions. Log-probabilities are those of the forced tokens, in nats.

    Attributes:
        n: number of predictions.
        bias: mean difference of the log-probability.
        bias_error: standard error of `bias`.
        rms: root mean square of the difference.
        p50: median of the absolute difference.
        p90: 90th percentile of the absolute difference.
        p95: 95th percentile of the absolute difference.
        p99: 99th percentile of the absolute difference.
        p999: 99.9th percentile of the absolute difference.
        max: largest absolute difference.
        kl_mean: mean of KL(reference || engine) over the vocabulary, or over the tokens that both sides list and one
            entry for the remaining probability.
        kl_max: maximum of the same divergence.
        agreement: fraction of predictions with the same likeliest token.
        flips: number of predictions with different likeliest tokens.
        near_tie_flips: flips at which the reference itself has a near-tie.
    """

    n: int
    bias: float
    bias_error: float
    rms: float
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    kl_mean: float
    kl_max: float
    agreement: float
    flips: int
    near_tie_flips: int


@dataclass(frozen=True)
class Differences:
    """Differences of each prediction of all sequences, the input of a `Summary`.

    Attributes:
        delta: (N,) float64, log-probability of the forced token, engine minus reference.
        kl: (N,) float64, KL(reference || engine).
        flipped: (N,) bool, whether the likeliest tokens differ.
        margin: (N,) float64, the reference's log-probability of its likeliest token minus that of the second.
        step: (N,) int64, decode step; 0 for the prefill.
        position: (N,) int64, position of the token before the predicted one.
        sequence: (N,) int64, index of the sequence.
    """

    delta: Tensor
    kl: Tensor
    flipped: Tensor
    margin: Tensor
    step: Tensor
    position: Tensor
    sequence: Tensor

    @classmethod
    def from_scores(
        cls, sequences: Sequence[TokenSequence], reference: Sequence[Scores], engine: Sequence[Scores]
    ) -> Differences:
        """Compute the differences of all sequences; the scores are in the order of `sequences`."""
        parts = []
        for index, (sequence, expected, ours) in enumerate(zip(sequences, reference, engine, strict=True)):
            count = sequence.num_predictions
            top = expected.logprobs.double().topk(2).values
            parts.append(
                (
                    torch.where(ours.target == expected.target, 0.0, ours.target - expected.target),
                    divergence(expected, ours),
                    likeliest(expected) != likeliest(ours),
                    top[:, 0] - top[:, 1],
                    torch.tensor([sequence.decode_step(prediction) for prediction in range(count)]),
                    torch.arange(count),
                    torch.full((count,), index),
                )
            )
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def where(self, mask: Tensor) -> Differences:
        """Return the predictions selected by `mask` (N,) bool."""
        return Differences(*(column[mask] for column in vars(self).values()))

    def summary(self, tie: float) -> Summary:
        """Summarize all predictions; a flip with a margin below `tie` nats counts as a near-tie."""
        size = self.delta.abs()
        count = len(size)
        return Summary(
            n=count,
            bias=float(self.delta.mean()),
            bias_error=float(self.delta.std() / math.sqrt(count)) if count > 1 else math.nan,
            rms=rms(self.delta),
            p50=_quantile(size, 0.5),
            p90=_quantile(size, 0.9),
            p95=_quantile(size, 0.95),
            p99=_quantile(size, 0.99),
            p999=_quantile(size, 0.999),
            max=float(size.max()),
            kl_mean=float(self.kl.mean()),
            kl_max=float(self.kl.max()),
            agreement=1 - float(self.flipped.double().mean()),
            flips=int(self.flipped.sum()),
            near_tie_flips=int((self.flipped & (self.margin < tie)).sum()),
        )


@dataclass(frozen=True)
class Comparison:
    """Comparison of an engine with the reference and the noise floor.

    Attributes:
        noise_floor_ratio: rms of the engine's differences divided by the rms of the floor's; the goal is at most 1.
        noise_floor_ratio_error: standard error of `noise_floor_ratio`, from a jackknife over sequences.
        p999_ratio: ratio of the 99.9th percentiles.
        engine: summary of all predictions.
        engine_prefill: summary of the prefill's predictions.
        engine_decode: summary of the decode steps' predictions; None without decode steps.
        floor: summaries of the reference's runs in the engine's dtype, by attention implementation.
        positions: summary of the prefill (step 0) and of each decode step.
        slope: slope of the absolute difference over decode steps, with its standard error; None below three steps.
        curve: rms of engine and floor in bins over the position in the sequence.
        histogram: counts of absolute differences of engine and floor, and the edges of the bins.
        outliers: limit (`OUTLIER` times the floor's largest error), count and share of the predictions beyond it.
        worst: the predictions with the largest differences.
    """

    noise_floor_ratio: float
    noise_floor_ratio_error: float
    p999_ratio: float
    engine: Summary
    engine_prefill: Summary
    engine_decode: Summary | None
    floor: Mapping[str, Summary]
    positions: Sequence[Mapping[str, Any]]
    slope: Mapping[str, float] | None
    curve: Sequence[Mapping[str, float]]
    histogram: Mapping[str, Sequence[float]]
    outliers: Mapping[str, float]
    worst: Sequence[Mapping[str, Any]]


def compare_scores(
    sequences: Sequence[TokenSequence],
    reference: Sequence[Scores],
    engine: Sequence[Scores],
    floors: Mapping[str, Sequence[Scores]],
    worst: int = 20,
) -> Comparison:
    """Compute all statistics of an engine.

    Args:
        sequences: the scored sequences.
        reference: the reference's scores, in the order of `sequences`.
        engine: the engine's scores, in the order of `sequences`.
        floors: scores of the reference in the engine's dtype, by attention implementation.
        worst: number of worst predictions to list.
    """
    ours = Differences.from_scores(sequences, reference, engine)
    noise = {name: Differences.from_scores(sequences, reference, scores) for name, scores in floors.items()}
    level = rms(torch.cat([some.delta for some in noise.values()]))
    tie = NEAR_TIE * level
    floor_sizes = torch.cat([some.delta.abs() for some in noise.values()])
    limit = OUTLIER * float(floor_sizes.max())
    count = int((~(ours.delta.abs() <= limit)).sum())
    decode = ours.where(ours.step > 0)
    steps = sorted(set(ours.step.tolist()))
    return Comparison(
        noise_floor_ratio=_ratio(rms(ours.delta), level),
        noise_floor_ratio_error=_jackknife(ours, list(noise.values())),
        p999_ratio=_ratio(_quantile(ours.delta.abs(), 0.999), _quantile(floor_sizes, 0.999)),
        engine=ours.summary(tie),
        engine_prefill=ours.where(ours.step == 0).summary(tie),
        engine_decode=decode.summary(tie) if len(decode.step) else None,
        floor={name: some.summary(tie) for name, some in noise.items()},
        positions=[{"step": step, **asdict(ours.where(ours.step == step).summary(tie))} for step in steps],
        slope=_slope(decode.step.double(), decode.delta.abs()),
        curve=_curve(ours, list(noise.values())),
        histogram=_histogram(ours.delta.abs(), floor_sizes, len(noise)),
        outliers={"limit": limit, "count": count, "share": count / len(ours.delta)},
        worst=_worst(sequences, reference, engine, ours, worst),
    )


def likeliest(scores: Scores) -> Tensor:
    """Return the ids (N,) of the tokens with the largest log-probability; the first of tied tokens."""
    if scores.ids is None:
        return scores.logprobs.argmax(-1)
    return scores.ids[:, 0]


def divergence(reference: Scores, engine: Scores) -> Tensor:
    """Return KL(reference || engine) of each prediction, (N,) in nats."""
    ids = reference.ids if reference.ids is not None else engine.ids
    if ids is None:
        return _kl(reference.logprobs.double(), engine.logprobs.double())
    (p, in_reference), (q, in_engine) = _logprobs_of(reference, ids), _logprobs_of(engine, ids)
    rest = ~(in_reference & in_engine)
    return _kl(_with_rest(p.masked_fill(rest, -torch.inf)), _with_rest(q.masked_fill(rest, -torch.inf)))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities (N, K). Tokens with p = 0 contribute zero."""
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0.0)


def _logprobs_of(scores: Scores, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (N, K) of tokens `ids` (N, K), and (N, K) bool: whether the scores list them."""
    if scores.ids is None:
        return scores.logprobs.double().gather(1, ids), torch.ones_like(ids, dtype=torch.bool)
    match = ids[:, :, None] == scores.ids[:, None, :]
    return scores.logprobs.double().gather(1, match.byte().argmax(-1)), match.any(-1)


def _with_rest(logprobs: Tensor) -> Tensor:
    """Append the log of the remaining probability: (N, K) -> (N, K + 1)."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=_LEAST_REST)
    return torch.cat((logprobs, rest.log()), -1)


def rms(x: Tensor) -> float:
    """Return the root mean square of all elements."""
    return float(x.square().mean().sqrt())


def _ratio(ours: float, floor: float) -> float:
    if not math.isfinite(floor):
        return math.nan  # a floor with NaN or Inf cannot serve as a yardstick
    if floor == 0:
        return 0.0 if ours == 0 else math.inf
    return ours / floor


def _quantile(x: Tensor, q: float) -> float:
    """Return a quantile by sorting, because `torch.quantile` limits the number of elements."""
    ordered = x.sort().values
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (at - low))


def _jackknife(ours: Differences, noise: Sequence[Differences]) -> float:
    """Return the standard error of the noise floor ratio, leaving out one sequence at a time."""
    sequences = ours.sequence.unique().tolist()
    if len(sequences) < 2:
        return math.nan
    values = []
    for excluded in sequences:
        kept = ours.sequence != excluded
        values.append(_ratio(rms(ours.delta[kept]), rms(torch.cat([some.delta[kept] for some in noise]))))
    estimates = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    return float(((count - 1) / count * (estimates - estimates.mean()).square().sum()).sqrt())


def _slope(x: Tensor, y: Tensor) -> dict[str, float] | None:
    """Return the least-squares slope of y over x with its standard error; None with fewer than three values of x."""
    if len(x.unique()) < 3:
        return None
    centred = x - x.mean()
    spread = centred.square().sum()
    slope = (centred * y).sum() / spread
    rest = y - y.mean() - slope * centred
    return {"per_step": float(slope), "standard_error": float((rest.square().sum() / (len(x) - 2) / spread).sqrt())}


def _curve(ours: Differences, noise: Sequence[Differences]) -> list[dict[str, float]]:
    last = int(ours.position.max()) + 1
    edges = sorted({round(index * last / _BINS) for index in range(_BINS + 1)})
    bins = []
    for start, stop in pairwise(edges):
        here = (ours.position >= start) & (ours.position < stop)
        if here.any():
            floor = rms(torch.cat([some.delta[here] for some in noise]))
            bins.append({"start": start, "stop": stop, "engine_rms": rms(ours.delta[here]), "floor_rms": floor})
    return bins


def _histogram(ours: Tensor, floor: Tensor, runs: int) -> dict[str, list[float]]:
    """Count absolute differences in logarithmic bins; the first bin includes all smaller values.

    The counts of the floor are divided by the number of `runs`.
    """
    both = torch.cat((ours, floor))
    finite = both[both.isfinite() & (both > 0)]
    if not len(finite):
        return {"edges": [0.0, 1.0], "engine": [len(ours)], "floor": [len(floor) / runs]}
    high = float(finite.max())
    low = max(float(finite.min()), high * 1e-5)
    edges = torch.logspace(math.log10(low), math.log10(high), _BINS + 1, dtype=torch.float64)
    bounds = edges[1:-1].contiguous()
    counts = [torch.bincount(torch.bucketize(x.double(), bounds), minlength=_BINS).tolist() for x in (ours, floor)]
    return {"edges": edges.tolist(), "engine": counts[0], "floor": [count / runs for count in counts[1]]}


def _worst(
    sequences: Sequence[TokenSequence],
    reference: Sequence[Scores],
    engine: Sequence[Scores],
    ours: Differences,
    count: int,
) -> list[dict[str, Any]]:
    size = ours.delta.abs().nan_to_num(torch.inf)
    rows = []
    for index in size.argsort(descending=True)[:count].tolist():
        number, position = int(ours.sequence[index]), int(ours.position[index])
        expected, given = reference[number], engine[number]
        tokens = sequences[number].token_ids
        step = int(ours.step[index])
        rows.append(
            {
                "sequence": number,
                "position": position + 1,
                "phase": f"decode {step}" if step else "prefill",
                "token": tokens[position + 1],
                "context_ids": list(tokens[max(0, position - 7) : position + 1]),
                "reference_logprob": float(expected.target[position]),
                "engine_logprob": float(given.target[position]),
                "delta": float(ours.delta[index]),
                "reference_top": int(likeliest(expected)[position]),
                "engine_top": int(likeliest(given)[position]),
            }
        )
    return rows
