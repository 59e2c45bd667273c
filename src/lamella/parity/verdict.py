"""Verdict: the tolerances, and the reasons why a result fails."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamella.parity.bisection import Bisection
from lamella.parity.path_matrix import PathMatrix
from lamella.parity.stats import Comparison


@dataclass(frozen=True)
class Tolerances:
    """Limits of `stats`. The limits of paths and bisection are constants in their modules.

    Attributes:
        ratio: limit of the noise floor ratio. Two standard errors are added to allow for sampling noise, up to
            `ratio_at_most`.
        ratio_at_most: upper bound of the limit after adding the standard errors.
        p999_ratio: limit of the ratio of the 99.9th percentiles, which are noisy with few samples.
        bias: limit of the absolute mean difference in units of the floor's rms; a bias within four standard errors
            passes too.
        outlier_share: limit of the fraction of outliers.
        exact: if no fp32 difference is larger than this number of nats, all limits above count as met.
    """

    ratio: float = 1.0
    ratio_at_most: float = 1.5
    p999_ratio: float = 2.0
    bias: float = 0.25
    outlier_share: float = 0.001
    exact: float = 1e-4


def judge_stats(result: Comparison, dtype: torch.dtype, tolerances: Tolerances) -> list[str]:
    """Return the reasons why the statistics fail; an empty list if they pass. NaN always fails."""
    if dtype == torch.float32 and result.engine.max <= tolerances.exact:
        return []
    error = result.noise_floor_ratio_error
    # With one sequence the standard error is unknown: allow half of the range up to ratio_at_most.
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
    """Return the reasons why the path matrix fails; an empty list if it passes."""
    return [f"path {cell.path!r}: {cell.why}" for cell in matrix.failures]


def judge_bisection(bisection: Bisection) -> list[str]:
    """Return the first wrong operation and the first with NaN or Inf as reasons; an empty list if there are none."""
    first, not_finite = bisection.first, bisection.first_not_finite
    reasons = [] if not_finite is None else [f"first operation that gives NaN or Inf: {not_finite}"]
    if first is not None and first is not not_finite:
        reasons.insert(0, f"first operation out of line: {first}")
    return reasons
