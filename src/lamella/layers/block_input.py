"""What enters a mixer or a feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from lamella.layers.canon import Canon
from lamella.layers.context import require_batch
from lamella.layers.linear import Linear
from lamella.layers.norm import LayerNorm, RMSNorm
from lamella.ops.linear import fused_linear, fuses
from lamella.ops.rms_norm.reference import NormStep
from lamella.ops.swiglu import swiglu


class BlockInput:
    """The stream in front of a block, `hidden + residual`, not yet added up, normed and convolved.

    A block's first projection brings that about, so that it can be part of the projection's own kernel. What enters is
    the same whichever way it is read, and is computed once: what projects several times reads it as a tensor first.
    """

    def __init__(self, hidden: Tensor, residual: Tensor, norm: RMSNorm | LayerNorm, canon: Canon | None) -> None:
        """hidden and residual (T, hidden_size)."""
        self._pair: tuple[Tensor, Tensor] | None = (hidden, residual)
        self._norm: RMSNorm | LayerNorm | None = norm
        self._canon = canon
        self._entered: Tensor | None = None
        self._residual: Tensor | None = None

    @classmethod
    def ready(cls, entered: Tensor) -> BlockInput:
        """What has been normed and convolved already (T, hidden_size), of a part of a block."""
        entry = cls.__new__(cls)
        entry._pair, entry._norm, entry._canon, entry._residual = None, None, None, None
        entry._entered = entered
        return entry

    @property
    def residual(self) -> Tensor:
        """The stream after the sum (T, hidden_size), once the block has read its input."""
        assert self._residual is not None, "a block left its input unread"
        return self._residual

    def tensor(self) -> Tensor:
        """The block's input itself (T, hidden_size): the sum, normed, and convolved where there is a canon."""
        if self._entered is None:
            hidden, residual = self._take()
            if self._canon is not None:
                assert self._norm is not None
                self._entered, self._residual = self._canon.after_norm(hidden, residual, self._norm)
            else:
                assert self._norm is not None
                self._entered, self._residual = self._norm(hidden, residual)
        return self._entered

    def fuses(self, linear: nn.Module, canon: Canon | None = None) -> bool:
        """Whether `project` is one kernel."""
        weight = linear.dense_weight if isinstance(linear, Linear) else None
        if weight is None or not fuses(self._source, weight):
            return False
        if self._norms_within and not (isinstance(self._norm, RMSNorm) and not self._norm.round_twice):
            return False
        return canon is None or canon.is_step

    def project(self, linear: nn.Module, canon: Canon | None = None, gated: bool = False) -> Tensor:
        """`linear` of the input, then the convolution `canon`, then `silu(gate) * up` if `gated`: (T, out)."""
        if self.fuses(linear, canon):
            assert isinstance(linear, Linear)
            norm = None
            if self._norms_within:
                assert isinstance(self._norm, RMSNorm)
                hidden, residual = self._take()
                norm = NormStep(residual, self._norm.weight, self._norm.eps)
            else:
                hidden = self.tensor()
            step = None if canon is None else canon.step()
            positions = require_batch().ragged.positions
            projected, total = fused_linear(
                hidden, linear.weight, linear.bias, gated=gated, norm=norm, conv=step, positions=positions
            )
            if norm is not None:
                self._residual = total
            return projected
        projected = linear(self.tensor())
        if canon is not None:
            return canon.swiglu(projected) if gated else canon(projected)
        return swiglu(projected) if gated else projected

    @property
    def _norms_within(self) -> bool:
        """Whether the norm can still be a part of the projection."""
        return self._pair is not None and self._canon is None

    @property
    def _source(self) -> Tensor:
        if self._pair is not None:
            return self._pair[0]
        assert self._entered is not None
        return self._entered

    def _take(self) -> tuple[Tensor, Tensor]:
        assert self._pair is not None, "a block projects its input twice: read it as a tensor"
        pair, self._pair = self._pair, None
        return pair
