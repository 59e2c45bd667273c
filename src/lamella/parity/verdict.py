"""What is good enough: the tolerances, and the reasons why a result is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamella.parity.bisection import Bisection
from lamella.parity.path_matrix import PathMatrix
from lamella.parity.stats import Comparison


@dataclass(frozen=True)
class Tolerances:
    """What `stats` allows; the paths' and the bisection's limits stand with them.

    Attributes:
        ratio: of the engine's rms error to the noise floor's. Two standard errors are added for the sample's chance,
            up to `ratio_at_most`.
        ratio_at_most: see there.
        p999_ratio: the same of the 99.9th percentiles, which few samples fix badly.
        bias: of the mean difference, in floor rms, unless it is within four of its own standard errors.
        outlier_share: of predictions that are off by more than twice what the floor ever is.
        exact: differences in fp32 that need no yardstick: where none is larger, all of the above holds.
    """

    ratio: float = 1.0
    ratio_at_most: float = 1.5
    p999_ratio: float = 2.0
    bias: float = 0.25
    outlier_share: float = 0.001
    exact: float = 1e-4


def judge_stats(result: Comparison, dtype: torch.dtype, tolerances: Tolerances) -> list[str]:
    """Why the engine is further from the truth than it may be; nothing where it is not. NaN never passes."""
    if dtype == torch.float32 and result.engine.max <= tolerances.exact:
        return []
    error = result.noise_floor_ratio_error
    # A single sequence says nothing of chance: half the way is left to it.
    chance = 2 * error if error == error else (tolerances.ratio_at_most - tolerances.ratio) / 2
    allowed = max(tolerances.ratio, min(tolerances.ratio + chance, tolerances.ratio_at_most))
    floor = max(summary.rms for summary in result.floor.values())
    engine, reasons = result.engine, []
    if not result.noise_floor_ratio <= allowed:
        reasons.append(
            f"rms error is {result.noise_floor_ratio:.3g} times the noise floor's, allowed are {allowed:.3g}"
        )
    if not result.p999_ratio <= tolerances.p999_ratio:
        reasons.append(
            f"99.9th percentile is {result.p999_ratio:.3g} times the floor's, allowed are {tolerances.p999_ratio:g}"
        )
    if not (abs(engine.bias) <= 4 * engine.bias_error or abs(engine.bias) <= tolerances.bias * floor):
        reasons.append(f"bias of {engine.bias:.3g}, with a standard error of {engine.bias_error:.2g}")
    if not result.outliers["share"] <= tolerances.outlier_share:
        reasons.append(f"{result.outliers['count']} outliers beyond {result.outliers['limit']:.3g}")
    return reasons


def judge_paths(matrix: PathMatrix) -> list[str]:
    return [f"path {cell.path!r}: {cell.why}" for cell in matrix.failures]


def judge_bisection(bisection: Bisection) -> list[str]:
    first, not_finite = bisection.first, bisection.first_not_finite
    reasons = [] if not_finite is None else [f"first operation that gives NaN or Inf: {not_finite}"]
    if first is not None and first is not not_finite:
        reasons.insert(0, f"first operation out of line: {first}")
    return reasons
