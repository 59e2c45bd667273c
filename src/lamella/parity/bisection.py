"""Which operation is wrong: each is fed the truth's input, in the real engine, and its output is compared.

The truth comes from one full forward in float64. The engine then computes the same tokens in chunks and single steps,
over its blocks and slots, while every operation's result is noted and replaced by the true one; so an operation that is
wrong shows at its own site, and nothing after it inherits the error. What rounding explains is measured the same way,
with the reference in the engine's dtype against the reference in float64.
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
from lamella.parity.tested_model import TestedModel

# Errors beyond so many times what rounding explains are out of line.
RATIO_LIMIT = 12.0
MAX_TOKENS = 256

# The first chunks: a cut inside a block, then one shorter than a short convolution's memory, then the prompt's rest.
CHUNKS = (5, 2)
DECODES = 8


# What it means that an operation, fed with the truth's input, gives NaN or Inf.
_NOT_FINITE = {
    "engine": "NaN or Inf in the engine, not in the reference: an overflow of the engine's dtype, or a wrong operation",
    "reference": "NaN or Inf in the reference, not in the engine",
    "both": "NaN or Inf in the engine and in the reference, which computes in float64: look for NaN, Inf or far too "
    "large numbers in the checkpoint's weights of this operation",
}


@dataclass(frozen=True)
class Row:
    """How one operation did.

    Attributes:
        site: its dotted path; `layer` and `op` say the same for people.
        max, rms: of its errors against the truth.
        relative: rms in units of the truth's own root mean square.
        explained: rms of the errors that rounding to the engine's dtype brings.
        ratio: the error in units of the explained one, at its worst position.
        out_of_line: whether rounding cannot be why.
        position, channel: the first position out of line, else the worst, and its worst channel.
        missing: which side has no such operation, if one has not ("engine" or "reference").
        not_finite: which side gives NaN or Inf, if one does ("engine", "reference" or "both"); `position` and `channel`
            are then the first such value's.
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
        place = f"{self.op} ({self.site})" if self.layer is None else f"layer {self.layer}, {self.op} ({self.site})"
        if self.missing:
            return f"{place}: the {self.missing} does not compute it"
        if self.not_finite:
            return f"{place}, position {self.position}, channel {self.channel}: {_NOT_FINITE[self.not_finite]}"
        return (
            f"{place}, position {self.position}, channel {self.channel}: rms error {self.rms:.3g}, largest "
            f"{self.max:.3g}, where rounding explains {self.explained:.3g}"
        )


@dataclass(frozen=True)
class Bisection:
    """All operations in the order in which the truth computes them.

    Attributes:
        rows: one for each operation.
        plan: tokens of each of the engine's steps.
        oracle: whose truth it is.
    """

    rows: tuple[Row, ...]
    plan: tuple[int, ...]
    oracle: str

    @property
    def first(self) -> Row | None:
        """The first operation out of line."""
        return next((row for row in self.rows if row.out_of_line), None)

    @property
    def first_not_finite(self) -> Row | None:
        """The first operation that gives NaN or Inf."""
        return next((row for row in self.rows if row.not_finite), None)


def run_bisect(
    tested: TestedModel,
    token_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    oracle: str = "auto",
    candidate: LanguageModel | None = None,
) -> Bisection:
    """Feed and compare every operation. `candidate` is tested in place of the one that the checkpoint gives."""
    if not DECODES + 4 <= len(token_ids) <= MAX_TOKENS:
        raise ParameterError(f"bisect takes {DECODES + 4} to {MAX_TOKENS} tokens, not {len(token_ids)}")
    oracle = resolve_reference(oracle, tested)
    inputs = token_ids[:-1]
    weights = tested.weights(device)
    plain = ReferenceModel(tested.config, weights, torch.float64, device)
    truth = _Recording()
    if oracle == "hf":
        from lamella.parity.scorers.hf import HFModel

        HFModel(tested, Settings(dtype=torch.float64, device=device)).logits(inputs, truth)
    else:
        plain.logits(inputs, truth)
    x_fp32, narrow = _Feeding(truth.values), _Feeding(truth.values)
    plain.logits(inputs, x_fp32)
    del plain
    ReferenceModel(tested.config, weights, dtype, device).logits(inputs, narrow)
    engine = _Feeding(truth.values, lambda: require_batch().ragged.positions)
    plan = _run_engine(candidate or tested.load(dtype, device), token_ids, device, engine)
    rows = []
    for site, expected in truth.values.items():
        rounding = narrow.values[site] - x_fp32.values[site]
        rows.append(_row(site, expected, engine.values.get(site), rounding, dtype))
    if oracle == "reference":
        # What the reference does not do, the engine must not do either; `transformers` may just not show it.
        rows += [_absent(site, "reference") for site in engine.extra]
    return Bisection(tuple(rows), plan, oracle)


def _run_engine(model: LanguageModel, token_ids: Sequence[int], device: torch.device, tap: Tap) -> tuple[int, ...]:
    # A replayed graph calls no module, so there would be nothing to tap.
    options = {"max_num_seqs": 1, "max_num_batched_tokens": MAX_TOKENS, "num_blocks": 64, "enforce_eager": True}
    engine = ForcedEngine(model, options, device)
    with tapped(model, tap):
        return tuple(engine.score([split(token_ids, DECODES)], CHUNKS)[0].steps)


class _Recording:
    """A tap that keeps every value, in float64."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def __call__(self, site: str, value: Tensor) -> Tensor:
        self.values[site] = value.double()
        return value


class _Feeding:
    """A tap that keeps every value and lets the truth go on in its place."""

    def __init__(self, truth: dict[str, Tensor], positions: Callable[[], Tensor] | None = None) -> None:
        self.values: dict[str, Tensor] = {}
        self.extra: dict[str, None] = {}  # sites, in order, where the truth has nothing
        self._reference, self._positions = truth, positions

    def __call__(self, site: str, value: Tensor) -> Tensor:
        if site not in self._reference:
            self.extra[site] = None
            return value
        truth = self._reference[site]
        at = torch.arange(truth.shape[0], device=truth.device) if self._positions is None else self._positions()
        if value.shape[1:] != truth.shape[1:]:
            return value  # of another width: the engine does not compute what the truth does
        self.values.setdefault(site, torch.full_like(truth, torch.nan))[at] = value.double()
        return truth[at].to(value.dtype)


def _row(site: str, truth: Tensor, value: Tensor | None, rounding: Tensor, dtype: torch.dtype) -> Row:
    if value is None:
        return _absent(site, "engine")
    error = (value - truth).abs()
    size = _rms(truth)
    # Where the reference happens to round nothing, half a unit in the last place is still nobody's mistake.
    explained = max(_rms(rounding), torch.finfo(dtype).eps / 8 * size, torch.finfo(torch.float64).tiny)
    by_row = error.square().mean(1).sqrt() / rounding.square().mean(1).sqrt().clamp(min=explained)
    by_value = error.amax(1) / max(float(rounding.abs().max()), 4 * explained)
    ratios = torch.maximum(by_row, by_value).nan_to_num(torch.inf, torch.inf)
    out = ratios > RATIO_LIMIT
    position = int(out.to(torch.uint8).argmax() if out.any() else ratios.argmax())
    channel = int(error[position].nan_to_num(torch.inf).argmax())
    sides = {"engine": ~value.isfinite(), "reference": ~truth.isfinite()}
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
    """An operation that only one of the two sides has."""
    nan, inf = float("nan"), float("inf")
    return Row(site, layer_of(site), operation(site), nan, nan, nan, nan, inf, True, 0, 0, missing=side)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
