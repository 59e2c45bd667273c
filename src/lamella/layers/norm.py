"""RMS normalisation as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamella.ops import rms_norm as ops


class RMSNorm(nn.Module):
    """Weighted RMS norm over the last dimension. The weight is fp32 whatever the model's dtype."""

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x (..., size); with a residual of its shape, (the norm of x + residual, x + residual)."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
