"""Projections and the embedding of the local engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.layers.norm import RMSNorm
from lamella.ops.linear import fuses_norm, linear, norm_linear, norm_swiglu_linear, wide_linear


class Linear(nn.Module):
    """`x W^T + b`, weight (out, in)."""

    def __init__(self, in_size: int, out_size: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def fuses_norm(self, x: Tensor) -> bool:
        """Whether `after_norm` has a kernel for x (T, in), and is allowed to use it."""
        return fuses_norm(x, self.weight)

    def after_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm, gated: bool = False) -> tuple[Tensor, Tensor]:
        """The projection of `norm(x, residual)` and the new residual in one kernel; `gated`: then `swiglu`."""
        product = norm_swiglu_linear if gated else norm_linear
        return product(x, residual, norm.weight, norm.eps, self.weight, self.bias)


class MergedLinear(Linear):
    """Several projections of one input as one product; a checkpoint holds them apart, under the names in `parts`."""

    def __init__(
        self, in_size: int, parts: Mapping[str, int], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(in_size, sum(parts.values()), bias, dtype, device)
        self.parts = dict(parts)


class Head(Linear):
    """The last projection, to logits (..., vocab) in fp32 whatever the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight)


class Embedding(nn.Module):
    """Token embedding, weight (vocab, hidden)."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype, device=device))

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.embedding(input_ids, self.weight)
