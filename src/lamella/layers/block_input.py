"""What enters a mixer or a feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from lamella.layers.canon import Canon
from lamella.layers.linear import Linear
from lamella.layers.norm import RMSNorm
from lamella.ops.swiglu import swiglu


class BlockInput:
    """The stream in front of a block, `hidden + residual`, not yet added up, normed and convolved.

    A block's first projection brings that about, so that it can be part of the projection's own kernel. What enters is
    the same whichever way it is read, and is computed once.
    """

    def __init__(self, hidden: Tensor, residual: Tensor, norm: RMSNorm, canon: Canon | None) -> None:
        """hidden and residual (T, hidden_size)."""
        self._pair: tuple[Tensor, Tensor] | None = (hidden, residual)
        self._norm, self._canon = norm, canon
        self._entered: Tensor | None = None
        self._residual: Tensor | None = None

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
                self._entered, self._residual = self._canon.after_norm(hidden, residual, self._norm)
            else:
                self._entered, self._residual = self._norm(hidden, residual)
        return self._entered

    def project(self, linear: nn.Module) -> Tensor:
        """`linear` of the input: (T, out)."""
        if isinstance(linear, Linear) and self._fuses(linear):
            projected, self._residual = linear.after_norm(*self._take(), self._norm)
            return projected
        return linear(self.tensor())

    def project_swiglu(self, linear: nn.Module) -> Tensor:
        """`silu(gate) * up` of `linear`'s output [gate | up]: (T, out / 2)."""
        if isinstance(linear, Linear) and self._fuses(linear):
            activated, self._residual = linear.after_norm(*self._take(), self._norm, gated=True)
            return activated
        return swiglu(linear(self.tensor()))

    def _fuses(self, linear: Linear) -> bool:
        return self._canon is None and self._pair is not None and linear.fuses_norm(self._pair[0])

    def _take(self) -> tuple[Tensor, Tensor]:
        assert self._pair is not None, "a block projects its input twice: read it as a tensor"
        pair, self._pair = self._pair, None
        return pair
