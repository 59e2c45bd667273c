"""Normalization modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamella.config import NormConfig
from lamella.layers.parameters import ParameterLayout
from lamella.ops import rms_norm as ops
from lamella.ops.operands import ResidualNorm
from lamella.parallel.group import Group
from lamella.parallel.sharding import Split


class RMSNorm(nn.Module):
    """Weighted RMS norm over the last dimension, computed in fp32.

    Attributes:
        weight: (size,) fp32, whatever the model's dtype.
        eps: added to the mean square.
        round_twice: whether to round to the model's dtype before the multiplication by the weight too, as
            `transformers` does. Such a norm is not fused with other operations.
    """

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))
        self.layouts = {"weight": ParameterLayout(initial=(1.0, 1.0))}
        self.eps = eps
        self.round_twice = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the norm of x (..., size), or the pair (norm of `x + residual`, `x + residual`) given a residual."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, twice=self.round_twice)
        return ops.add_rms_norm(x, ResidualNorm(residual, self.weight, self.eps), self.round_twice)


class HeadNorm(nn.Module):
    """RMS norm of each head without a weight."""

    weight: Tensor

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(size, dtype=torch.float32, device=device), persistent=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x (T, heads, size)."""
        return ops.rms_norm(x, self.weight, self.eps)


class SplitRMSNorm(RMSNorm):
    """RMS norm over channels that are divided evenly over the ranks.

    Replicated channels (key/value heads) do not change the mean, because every channel is held by the same number of
    ranks.
    """

    def __init__(self, channels: Split, eps: float, device: torch.device, group: Group) -> None:
        super().__init__(channels.size, eps, device)
        self.layouts, self.group = {"weight": ParameterLayout((channels,), initial=(1.0, 1.0))}, group

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the norm of x (..., size), this rank's channels; the mean square is over all ranks' channels."""
        assert residual is None, "the residual stream is not split"
        x_fp32 = x.float()
        mean = self.group.all_reduce(x_fp32.square().mean(-1, keepdim=True)) / self.group.partition.size
        normed = x_fp32 * torch.rsqrt(mean + self.eps)
        if self.round_twice:
            normed = normed.to(x.dtype).float()
        return (normed * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm (mean and variance) over the last dimension, with weight and bias in fp32."""

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(size, dtype=torch.float32, device=device)) for _ in "wb")
        self.layouts = {"weight": ParameterLayout(initial=(1.0, 1.0))}
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the norm of x (..., size), or the pair (norm of `x + residual`, `x + residual`) given a residual."""
        if residual is not None:
            total = x + residual
            return self._norm(total), total
        return self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        x_fp32 = nn.functional.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)
        return x_fp32.to(x.dtype)


def build_norm(config: NormConfig, size: int, device: torch.device) -> RMSNorm | LayerNorm:
    """Build the norm before a mixer or a feed-forward."""
    return (RMSNorm if config.kind == "rms" else LayerNorm)(size, config.eps, device)
