"""Input of a mixer or a feed-forward: the residual stream, normed and convolved."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lamella.layers.canon import Canon
from lamella.layers.linear import Linear
from lamella.layers.norm import LayerNorm, RMSNorm
from lamella.ops.linear import fused_linear, fuses
from lamella.ops.operands import ResidualNorm
from lamella.ops.swiglu import swiglu


class _Unread(NamedTuple):
    """Tensors that the input is computed from, while nothing has read it."""

    hidden: Tensor
    residual: Tensor
    norm: RMSNorm | LayerNorm
    canon: Canon | None


class BlockInput:
    """Input of one part of a layer: `hidden + residual`, normed, and convolved where there is a canon.

    The sum, norm and convolution are computed when the input is first read, so that they can be part of the first
    projection's own kernel. The input is the same whichever way it is read, and is computed once. A part with several
    projections reads it as a tensor first.
    """

    def __init__(self, hidden: Tensor, residual: Tensor, norm: RMSNorm | LayerNorm, canon: Canon | None) -> None:
        """Take hidden and residual (T, hidden_size), the norm of their sum, and the convolution behind it."""
        self._unread: _Unread | None = _Unread(hidden, residual, norm, canon)
        self._entered: Tensor | None = None
        self._residual: Tensor | None = None

    @classmethod
    def ready(cls, entered: Tensor) -> BlockInput:
        """Return an input that has been normed and convolved already (T, hidden_size)."""
        entry = cls.__new__(cls)
        entry._unread, entry._residual = None, None
        entry._entered = entered
        return entry

    @property
    def residual(self) -> Tensor:
        """The residual stream after the sum (T, hidden_size), once the input has been read."""
        assert self._residual is not None, "a layer's part left its input unread"
        return self._residual

    @property
    def source(self) -> Tensor:
        """A tensor of the input's device and dtype, which costs nothing to ask for."""
        return self.tensor() if self._unread is None else self._unread.hidden

    def tensor(self) -> Tensor:
        """Return the input itself (T, hidden_size)."""
        if self._entered is None:
            hidden, residual, norm, canon = self._take()
            if canon is not None:
                self._entered, self._residual = canon.after_norm(hidden, residual, norm)
            else:
                self._entered, self._residual = norm(hidden, residual)
        return self._entered

    def fuses(self, linear: nn.Module, canon: Canon | None = None) -> bool:
        """Return whether `project` is one kernel."""
        weight = linear.dense_weight if isinstance(linear, Linear) else None
        if weight is None or not fuses(self.source, weight):
            return False
        norm = self._inner_norm()
        if norm is not None and not (isinstance(norm, RMSNorm) and not norm.round_twice):
            return False
        return canon is None or canon.is_step

    def project(self, linear: nn.Module, canon: Canon | None = None, gated: bool = False) -> Tensor:
        """Return `linear` of the input, then the convolution `canon`, then `silu(gate) * up` if `gated`: (T, out)."""
        if self.fuses(linear, canon):
            assert isinstance(linear, Linear)
            norm, inner = None, self._inner_norm()
            if inner is None:
                hidden = self.tensor()
            else:
                hidden, residual, _, _ = self._take()
                norm = ResidualNorm(residual, inner.weight, inner.eps)
            step = None if canon is None else canon.step()
            projected, total = fused_linear(hidden, linear.weight, linear.bias, gated, norm, step)
            if norm is not None:
                self._residual = total
            return projected
        projected = linear(self.tensor())
        if canon is not None:
            return canon.swiglu(projected) if gated else canon(projected)
        return swiglu(projected) if gated else projected

    def _inner_norm(self) -> RMSNorm | LayerNorm | None:
        """Return the norm, where it can still be a part of the projection."""
        unread = self._unread
        return None if unread is None or unread.canon is not None else unread.norm

    def _take(self) -> _Unread:
        assert self._unread is not None, "a layer's part projects its input twice: read it as a tensor"
        unread, self._unread = self._unread, None
        return unread
