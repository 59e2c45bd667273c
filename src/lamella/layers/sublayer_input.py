"""Input of a mixer or a feed-forward: the residual stream after its norm and, if configured, a canon convolution."""

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
    """Operands of an input that has not been computed yet."""

    hidden: Tensor
    residual: Tensor
    norm: RMSNorm | LayerNorm
    canon: Canon | None


class SublayerInput:
    """Lazily computed input of a layer's attention part or feed-forward part.

    The input is `norm(hidden + residual)`, followed by the canon convolution if there is one. It is computed when it is
    first read, so that a fused kernel can compute it together with the first projection. It is computed once, and both
    ways of reading it (`tensor` and `project`) give the same values. A part with several projections must call `tensor`
    first.
    """

    def __init__(self, hidden: Tensor, residual: Tensor, norm: RMSNorm | LayerNorm, canon: Canon | None) -> None:
        """Keep the operands until the input is read.

        Args:
            hidden: (T, hidden_size), output of the previous part.
            residual: (T, hidden_size), residual stream before `hidden` is added.
            norm: norm of the sum.
            canon: convolution after the norm, or None.
        """
        self._unread: _Unread | None = _Unread(hidden, residual, norm, canon)
        self._value: Tensor | None = None
        self._residual: Tensor | None = None

    @classmethod
    def from_tensor(cls, value: Tensor) -> SublayerInput:
        """Return an input whose value (T, hidden_size), after norm and convolution, is already known."""
        entry = cls.__new__(cls)
        entry._unread, entry._residual = None, None
        entry._value = value
        return entry

    @property
    def residual(self) -> Tensor:
        """The residual stream after the sum (T, hidden_size), once the input has been read."""
        assert self._residual is not None, "a mixer or feed-forward did not read its input"
        return self._residual

    @property
    def source(self) -> Tensor:
        """A tensor with the device and dtype of the input, available without computing the input."""
        return self.tensor() if self._unread is None else self._unread.hidden

    def tensor(self) -> Tensor:
        """Return the input (T, hidden_size); compute it on the first call."""
        if self._value is None:
            hidden, residual, norm, canon = self._consume()
            if canon is not None:
                self._value, self._residual = canon.after_norm(hidden, residual, norm)
            else:
                self._value, self._residual = norm(hidden, residual)
        return self._value

    def fuses(self, linear: nn.Module, canon: Canon | None = None) -> bool:
        """Return True if `project` runs as one fused kernel."""
        weight = linear.dense_weight if isinstance(linear, Linear) else None
        if weight is None or not fuses(self.source, weight):
            return False
        norm = self._inner_norm()
        if norm is not None and not (isinstance(norm, RMSNorm) and not norm.round_twice):
            return False
        return canon is None or canon.is_step

    def project(self, linear: nn.Module, canon: Canon | None = None, gated: bool = False) -> Tensor:
        """Return the projected input, in one fused kernel if `fuses` is True.

        Args:
            linear: projection from hidden_size channels.
            canon: convolution of the projected values, or None.
            gated: whether to apply `silu(gate) * up` last, to projected values [gate | up].

        Returns:
            (T, out_size); (T, out_size / 2) if `gated`.
        """
        if self.fuses(linear, canon):
            assert isinstance(linear, Linear)
            norm, inner = None, self._inner_norm()
            if inner is None:
                hidden = self.tensor()
            else:
                hidden, residual, _, _ = self._consume()
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
        """Return the norm if it can be fused with the projection: the input is not computed, and has no canon."""
        unread = self._unread
        return None if unread is None or unread.canon is not None else unread.norm

    def _consume(self) -> _Unread:
        """Return the operands and mark the input as read."""
        assert self._unread is not None, "a mixer or feed-forward projects its input twice: call tensor() first"
        unread, self._unread = self._unread, None
        return unread
