"""The old number: two engines generate freely, and whatever they say at the same position is compared.

This is the procedure of published comparisons of an engine with `transformers`: greedy tokens, the engine's 20
likeliest at each position, the mean of their absolute differences. After the first difference the two continue
different texts, so the match falls by a constant factor at each step and most "outliers" compare unlike contexts. The
hazard says what is behind it: how often two texts that are still the same part at the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamella.parity.scores import Generation

TOP = 20
OUTLIER = 1.0  # nats, as published


@dataclass(frozen=True)
class FreeRunning:
    """Free-running agreement; step 0 is the token after the prompt.

    Attributes:
        positions: for each step its n, match (share of equal tokens), and of the mean differences in nats: mean, p50,
            p95, max.
        overall: match, and of all mean differences: mean, std, p10, p50, p90, p95, p99, max, outliers (beyond 1 nat)
            and their share; outliers_same_text counts those before the texts part.
        hazard: partings per step of texts that were the same until then.
    """

    positions: Sequence[dict[str, Any]]
    overall: dict[str, Any]
    hazard: float


def compare_generations(engine: Sequence[Generation], reference: Sequence[Generation]) -> FreeRunning:
    """Both of the same prompts and lengths; the reference's scores of the whole vocabulary."""
    match = torch.tensor(
        [
            [a == b for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)]
            for ours, theirs in zip(engine, reference, strict=True)
        ]
    )
    gaps = torch.stack([_gaps(*pair) for pair in zip(engine, reference, strict=True)])  # (prompts, steps)
    same_before = torch.cat((torch.ones_like(match[:, :1]), match[:, :-1]), 1).cumprod(1).bool()
    at_risk, parted = int(same_before.sum()), int((same_before & ~match).sum())
    outliers = ~(gaps <= OUTLIER)
    positions = [
        {"step": step, "n": len(match), "match": _chunk_size(match[:, step]), **_quantiles(gaps[:, step], (0.5, 0.95))}
        for step in range(match.shape[1])
    ]
    overall = {
        "match": _chunk_size(match),
        **_quantiles(gaps.flatten(), (0.1, 0.5, 0.9, 0.95, 0.99)),
        "std": float(gaps.std()) if gaps.numel() > 1 else 0.0,
        "outliers": int(outliers.sum()),
        "outlier_share": _chunk_size(outliers),
        "outliers_same_text": int((outliers & same_before).sum()),
    }
    return FreeRunning(positions, overall, parted / at_risk)


def _gaps(engine: Generation, reference: Generation) -> Tensor:
    """(steps,) mean absolute difference over the engine's likeliest tokens."""
    assert reference.scores.ids is None
    ours, ids = engine.scores.logprobs.double(), engine.scores.ids
    if ids is None:
        ours, ids = ours.topk(min(TOP, ours.shape[1]))
    return (ours[:, :TOP] - reference.scores.logprobs.double().gather(1, ids[:, :TOP])).abs().mean(1)


def _chunk_size(x: Tensor) -> float:
    return float(x.double().mean())


def _quantiles(x: Tensor, points: Sequence[float]) -> dict[str, float]:
    named = {f"p{round(100 * q)}": float(torch.quantile(x, q)) for q in points}
    return {"mean": float(x.mean()), **named, "max": float(x.max())}
