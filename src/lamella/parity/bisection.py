"""Bisection: find the first wrong operation by feeding every operation of the engine the reference's input.

The reference values come from one full forward in float64. The engine then computes the same tokens in chunks and
single decode steps over its blocks and slots. The output of every operation is recorded and replaced by the reference's
value, so that an error shows at its own site and is not passed on. The error that rounding explains is measured in the
same way, with the reference in the engine's dtype against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.errors import ParameterError
from lamella.layers.context import require_batch
from lamella.layers.decoder import LanguageModel
from lamella.parity.forcing import ForcedEngine
from lamella.parity.probe import tapped
from lamella.parity.reference_model import ReferenceModel
from lamella.parity.scorers import resolve_reference
from lamella.parity.scores import Settings
from lamella.parity.sequences import split
from lamella.parity.sites import Tap, layer_of, operation
from lamella.parity.tested_model import ModelUnderTest

# An operation is out of line if its error is more than this many times the rounding error.
RATIO_LIMIT = 12.0
MAX_TOKENS = 256

# Lengths of the first chunks: the first ends inside a block, the second is shorter than a short convolution's window.
# The rest of the prompt is the third chunk.
CHUNKS = (5, 2)
DECODES = 8


# Explanations for an operation that returns NaN or Inf for the reference's input.
_NOT_FINITE = {
    "engine": "NaN or Inf in the engine, not in the reference: an overflow of the engine's dtype, or a wrong operation",
    "reference": "NaN or Inf in the reference, not in the engine",
    "both": "NaN or Inf in the engine and in the reference, which computes in float64: look for NaN, Inf or far too "
    "large numbers in the checkpoint's weights of this operation",
}


@dataclass(frozen=True)
class Row:
    """Result of one operation.

    Attributes:
        site: dotted path of the operation.
        layer: index of the layer; None outside the layers.
        op: readable name of the operation.
        max: largest absolute error against the reference.
        rms: root mean square of the error.
        relative: rms divided by the root mean square of the reference's value.
        explained: rms of the error that rounding to the engine's dtype causes.
        ratio: error divided by the rounding error, at the worst position.
        out_of_line: whether the error is larger than rounding explains.
        position: first position that is out of line, otherwise the worst.
        channel: worst channel at `position`.
        missing: the side that does not compute this operation ("engine" or "reference"); None if both do.
        not_finite: the side with NaN or Inf ("engine", "reference" or "both"), or None. If set, `position` and
            `channel` are those of the first such value.
    """

    site: str
    layer: int | None
    op: str
    max: float
    rms: float
    relative: float
    explained: float
    ratio: float
    out_of_line: bool
    position: int
    channel: int
    missing: str | None = None
    not_finite: str | None = None

    def __str__(self) -> str:
        location = f"{self.op} ({self.site})" if self.layer is None else f"layer {self.layer}, {self.op} ({self.site})"
        if self.missing:
            return f"{location}: the {self.missing} does not compute it"
        if self.not_finite:
            return f"{location}, position {self.position}, channel {self.channel}: {_NOT_FINITE[self.not_finite]}"
        return (
            f"{location}, position {self.position}, channel {self.channel}: rms error {self.rms:.3g}, largest "
            f"{self.max:.3g}, where rounding explains {self.explained:.3g}"
        )


@dataclass(frozen=True)
class Bisection:
    """Results of all operations.

    Attributes:
        rows: results in the order in which the reference computes the operations.
        plan: number of tokens of each engine step.
        reference: "hf" or "reference".
    """

    rows: tuple[Row, ...]
    plan: tuple[int, ...]
    reference: str

    @property
    def first(self) -> Row | None:
        """The first operation out of line, or None."""
        return next((row for row in self.rows if row.out_of_line), None)

    @property
    def first_not_finite(self) -> Row | None:
        """The first operation that returns NaN or Inf, or None."""
        return next((row for row in self.rows if row.not_finite), None)


def run_bisect(
    tested: ModelUnderTest,
    token_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    reference: str = "auto",
    candidate: LanguageModel | None = None,
) -> Bisection:
    """Run the bisection over one sequence.

    Args:
        tested: model under test.
        token_ids: 12 to 256 tokens.
        dtype: dtype of the engine.
        device: device of engine and reference.
        reference: "auto", "hf" or "reference".
        candidate: loaded model to test instead of the checkpoint's.

    Raises:
        ParameterError: too few or too many tokens.
    """
    if not DECODES + 4 <= len(token_ids) <= MAX_TOKENS:
        raise ParameterError(f"bisect takes {DECODES + 4} to {MAX_TOKENS} tokens, not {len(token_ids)}")
    reference = resolve_reference(reference, tested)
    inputs = token_ids[:-1]
    weights = tested.weights(device)
    plain = ReferenceModel(tested.config, weights, torch.float64, device)
    recording = _Recording()
    if reference == "hf":
        from lamella.parity.scorers.hf import HFModel

        HFModel(tested, Settings(dtype=torch.float64, device=device)).logits(inputs, recording)
    else:
        plain.logits(inputs, recording)
    in_fp64, in_dtype = _Feeding(recording.values), _Feeding(recording.values)
    plain.logits(inputs, in_fp64)
    del plain
    ReferenceModel(tested.config, weights, dtype, device).logits(inputs, in_dtype)
    engine = _Feeding(recording.values, lambda: require_batch().ragged.positions)
    plan = _run_engine(candidate or tested.load(dtype, device), token_ids, device, engine)
    rows = []
    for site, expected in recording.values.items():
        rounding = in_dtype.values[site] - in_fp64.values[site]
        rows.append(_row(site, expected, engine.values.get(site), rounding, dtype))
    if reference == "reference":
        # An operation that only the engine computes is an error. `transformers` may compute it where no tap sees it.
        rows += [_absent(site, "reference") for site in engine.extra]
    return Bisection(tuple(rows), plan, reference)


def _run_engine(model: LanguageModel, token_ids: Sequence[int], device: torch.device, tap: Tap) -> tuple[int, ...]:
    """Score the tokens with the engine through `tap`; return the number of tokens of each step."""
    # Eager, because a replayed CUDA graph calls no module and so no tap.
    options = {"max_num_seqs": 1, "max_num_batched_tokens": MAX_TOKENS, "num_blocks": 64, "enforce_eager": True}
    engine = ForcedEngine(model, options, device)
    with tapped(model, tap):
        return tuple(engine.score([split(token_ids, DECODES)], CHUNKS)[0].steps)


class _Recording:
    """Tap that records every value in float64."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def __call__(self, site: str, value: Tensor) -> Tensor:
        self.values[site] = value.double()
        return value


class _Feeding:
    """Tap that records every value and continues with the reference's value.

    Attributes:
        values: recorded values by site, in float64, at the positions that were computed.
        extra: sites, in order, that the reference does not have.
    """

    def __init__(self, reference: dict[str, Tensor], positions: Callable[[], Tensor] | None = None) -> None:
        self.values: dict[str, Tensor] = {}
        self.extra: dict[str, None] = {}
        self._reference, self._positions = reference, positions

    def __call__(self, site: str, value: Tensor) -> Tensor:
        if site not in self._reference:
            self.extra[site] = None
            return value
        expected = self._reference[site]
        at = torch.arange(expected.shape[0], device=expected.device) if self._positions is None else self._positions()
        if value.shape[1:] != expected.shape[1:]:
            return value  # another width: the two operations are not comparable
        self.values.setdefault(site, torch.full_like(expected, torch.nan))[at] = value.double()
        return expected[at].to(value.dtype)


def _row(site: str, expected: Tensor, value: Tensor | None, rounding: Tensor, dtype: torch.dtype) -> Row:
    if value is None:
        return _absent(site, "engine")
    error = (value - expected).abs()
    size = _rms(expected)
    # Allow an eighth of the dtype's epsilon even if the reference happens to have no rounding error here.
    explained = max(_rms(rounding), torch.finfo(dtype).eps / 8 * size, torch.finfo(torch.float64).tiny)
    by_row = error.square().mean(1).sqrt() / rounding.square().mean(1).sqrt().clamp(min=explained)
    by_value = error.amax(1) / max(float(rounding.abs().max()), 4 * explained)
    ratios = torch.maximum(by_row, by_value).nan_to_num(torch.inf, torch.inf)
    out = ratios > RATIO_LIMIT
    position = int(out.to(torch.uint8).argmax() if out.any() else ratios.argmax())
    channel = int(error[position].nan_to_num(torch.inf).argmax())
    sides = {"engine": ~value.isfinite(), "reference": ~expected.isfinite()}
    bad = [side for side, where in sides.items() if where.any()]
    if bad:
        position, channel = (int(index) for index in (sides["engine"] | sides["reference"]).nonzero()[0])
    return Row(
        site=site,
        layer=layer_of(site),
        op=operation(site),
        max=float(error.max()),
        rms=_rms(error),
        relative=_rms(error) / size if size else float(_rms(error) > 0),
        explained=explained,
        ratio=float(ratios.max()),
        out_of_line=bool(out.any()),
        position=position,
        channel=channel,
        not_finite="both" if len(bad) == 2 else bad[0] if bad else None,
    )


def _absent(site: str, side: str) -> Row:
    """Return the row of an operation that one side does not compute."""
    nan, inf = float("nan"), float("inf")
    return Row(site, layer_of(site), operation(site), nan, nan, nan, nan, inf, True, 0, 0, missing=side)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
