"""How far an engine is from the truth, and how far it may be: statistics of teacher-forced log-probabilities.

All differences are of natural log-probabilities, engine less truth. The yardstick is the noise floor: what the
reference itself loses when it computes in the engine's dtype, under two implementations of attention.
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

# A flip of the likeliest token is a near-tie where the truth prefers its own by less than this many floor rms: three
# standard deviations of the difference of two such errors.
NEAR_TIE = 3 * math.sqrt(2)
# An outlier is off by more than so many times the floor's own worst.
OUTLIER = 2.0
_BINS = 24
# The rest of float32 probabilities is known to about this much.
_LEAST_REST = 1e-6


@dataclass(frozen=True)
class Summary:
    """Differences over some predictions.

    Attributes:
        n: predictions.
        bias, bias_error: mean difference of the forced token's log-probability, and its standard error.
        rms: its root mean square.
        p50, p90, p95, p99, p999, max: quantiles of its size.
        kl_mean, kl_max: divergence KL(truth || engine) in nats, over the vocabulary, or over the tokens that both
            sides name and the rest as one.
        agreement: share of predictions with the same likeliest token.
        flips: predictions with another one.
        near_tie_flips: those of them that the truth itself holds for nearly a tie.
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
    """One value for each prediction of all sequences, (N,) float64: what a `Summary` is made of."""

    delta: Tensor
    kl: Tensor
    flipped: Tensor  # bool
    margin: Tensor  # by how much the truth prefers its likeliest token to the next
    step: Tensor  # int64, 0 for the prefill's, else the decode step
    position: Tensor  # int64, of the token in front of the predicted one
    sequence: Tensor  # int64

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence], truth: Sequence[Scores], engine: Sequence[Scores]) -> Differences:
        parts = []
        for index, (sequence, expected, ours) in enumerate(zip(sequences, truth, engine, strict=True)):
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
        return Differences(*(column[mask] for column in vars(self).values()))

    def summary(self, tie: float) -> Summary:
        """`tie` is the margin below which a flip counts as a near-tie."""
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
    """An engine against the truth and the noise floor.

    Attributes:
        noise_floor_ratio: rms of the engine's differences over that of the floor's; at most 1 is the goal.
        noise_floor_ratio_error: its standard error (leave one sequence out at a time).
        p999_ratio: the same of the 99.9th percentile.
        engine, engine_prefill, engine_decode: summaries of all, the prefill's and the decode steps' predictions.
        floor: summaries of the reference's runs in the engine's dtype, by implementation of attention.
        positions: a summary for the prefill (step 0) and for each decode step.
        slope: per decode step, of the size of the difference, with its standard error; None below three steps.
        curve: rms against the position in the sequence, engine and floor, in bins.
        histogram: counts of the size of differences, engine and floor, and the bins' edges.
        outliers: predictions that are off by more than the floor ever is, `OUTLIER` times over.
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
    truth: Sequence[Scores],
    engine: Sequence[Scores],
    floors: Mapping[str, Sequence[Scores]],
    worst: int = 20,
) -> Comparison:
    """Everything about one engine's scores. All scores are of the same `sequences`, in their order."""
    ours = Differences.of(sequences, truth, engine)
    noise = {name: Differences.of(sequences, truth, scores) for name, scores in floors.items()}
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
        worst=_worst(sequences, truth, engine, ours, worst),
    )


def likeliest(scores: Scores) -> Tensor:
    """(N,) the token with the largest log-probability; the first of equals."""
    if scores.ids is None:
        return scores.logprobs.argmax(-1)
    return scores.ids[:, 0]


def divergence(truth: Scores, engine: Scores) -> Tensor:
    """KL(truth || engine), (N,) nats."""
    ids = truth.ids if truth.ids is not None else engine.ids
    if ids is None:
        return _kl(truth.logprobs.double(), engine.logprobs.double())
    (p, in_reference), (q, in_engine) = _of_tokens(truth, ids), _of_tokens(engine, ids)
    rest = ~(in_reference & in_engine)
    return _kl(_with_rest(p.masked_fill(rest, -torch.inf)), _with_rest(q.masked_fill(rest, -torch.inf)))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Over log-probabilities (N, K). Tokens that p excludes count nothing."""
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0.0)


def _of_tokens(scores: Scores, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) log-probabilities of given tokens, and whether the scores name them."""
    if scores.ids is None:
        return scores.logprobs.double().gather(1, ids), torch.ones_like(ids, dtype=torch.bool)
    match = ids[:, :, None] == scores.ids[:, None, :]
    return scores.logprobs.double().gather(1, match.byte().argmax(-1)), match.any(-1)


def _with_rest(logprobs: Tensor) -> Tensor:
    """(N, K) -> (N, K + 1), with all that is not named as one."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=_LEAST_REST)
    return torch.cat((logprobs, rest.log()), -1)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _ratio(ours: float, floor: float) -> float:
    if not math.isfinite(floor):
        return math.nan  # a floor that is broken itself measures nothing
    if floor == 0:
        return 0.0 if ours == 0 else math.inf
    return ours / floor


def _quantile(x: Tensor, q: float) -> float:
    """By sorting: torch's own limits the number of elements."""
    ordered = x.sort().values
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (at - low))


def _jackknife(ours: Differences, noise: Sequence[Differences]) -> float:
    """Standard error of the ratio, from leaving out one sequence at a time."""
    sequences = ours.sequence.unique().tolist()
    if len(sequences) < 2:
        return math.nan
    values = []
    for left_out in sequences:
        kept = ours.sequence != left_out
        values.append(_ratio(rms(ours.delta[kept]), rms(torch.cat([some.delta[kept] for some in noise]))))
    estimates = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    return float(((count - 1) / count * (estimates - estimates.mean()).square().sum()).sqrt())


def _slope(x: Tensor, y: Tensor) -> dict[str, float] | None:
    """Least squares of y on x."""
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
    """Over sizes in logarithmic bins; the floor's counts are of one run. The first takes all that is smaller."""
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
    truth: Sequence[Scores],
    engine: Sequence[Scores],
    ours: Differences,
    count: int,
) -> list[dict[str, Any]]:
    size = ours.delta.abs().nan_to_num(torch.inf)
    rows = []
    for index in size.argsort(descending=True)[:count].tolist():
        number, position = int(ours.sequence[index]), int(ours.position[index])
        expected, given = truth[number], engine[number]
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
