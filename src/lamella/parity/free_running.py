"""Free-running comparison: two engines generate greedily, and their log-probabilities at equal steps are compared.

This is the procedure of published comparisons of an engine with `transformers`: greedy tokens, the engine's 20
likeliest tokens at each position, the mean of their absolute differences. After the first different token the two
engines continue different texts. The match rate then falls by a constant factor per step, and most "outliers" compare
different contexts.
The hazard measures the cause: how often two texts that are still equal diverge at the next step.
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
    """Free-running agreement. Step 0 is the token after the prompt.

    Attributes:
        positions: for each step: n, match (fraction of equal tokens), and mean, p50, p95 and max of the mean absolute
            differences in nats.
        overall: match over all steps; mean, std, p10, p50, p90, p95, p99 and max of all mean absolute differences;
            outliers (beyond 1 nat), their share, and outliers_same_text, those before the texts diverge.
        hazard: fraction of steps at which texts that were equal so far diverge.
    """

    positions: Sequence[dict[str, Any]]
    overall: dict[str, Any]
    hazard: float


def compare_generations(engine: Sequence[Generation], reference: Sequence[Generation]) -> FreeRunning:
    """Compare two sets of generations.

    Args:
        engine: generations of the engine.
        reference: generations of the reference for the same prompts, with the same lengths, and with scores of the
            whole vocabulary.
    """
    match = torch.tensor(
        [
            [a == b for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)]
            for ours, theirs in zip(engine, reference, strict=True)
        ]
    )
    gaps = torch.stack([_gaps(*pair) for pair in zip(engine, reference, strict=True)])  # (prompts, steps)
    same_before = torch.cat((torch.ones_like(match[:, :1]), match[:, :-1]), 1).cumprod(1).bool()
    at_risk, diverged = int(same_before.sum()), int((same_before & ~match).sum())
    outliers = ~(gaps <= OUTLIER)
    positions = [
        {"step": step, "n": len(match), "match": _fraction(match[:, step]), **_quantiles(gaps[:, step], (0.5, 0.95))}
        for step in range(match.shape[1])
    ]
    overall = {
        "match": _fraction(match),
        **_quantiles(gaps.flatten(), (0.1, 0.5, 0.9, 0.95, 0.99)),
        "std": float(gaps.std()) if gaps.numel() > 1 else 0.0,
        "outliers": int(outliers.sum()),
        "outlier_share": _fraction(outliers),
        "outliers_same_text": int((outliers & same_before).sum()),
    }
    return FreeRunning(positions, overall, diverged / at_risk)


def _gaps(engine: Generation, reference: Generation) -> Tensor:
    """Return the mean absolute difference over the engine's likeliest tokens at each step, (steps,)."""
    assert reference.scores.ids is None
    ours, ids = engine.scores.logprobs.double(), engine.scores.ids
    if ids is None:
        ours, ids = ours.topk(min(TOP, ours.shape[1]))
    return (ours[:, :TOP] - reference.scores.logprobs.double().gather(1, ids[:, :TOP])).abs().mean(1)


def _fraction(x: Tensor) -> float:
    return float(x.double().mean())


def _quantiles(x: Tensor, points: Sequence[float]) -> dict[str, float]:
    named = {f"p{round(100 * q)}": float(torch.quantile(x, q)) for q in points}
    return {"mean": float(x.mean()), **named, "max": float(x.max())}
