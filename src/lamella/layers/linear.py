"""Projections and the embedding of the local engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.ops.linear import linear, wide_linear


class Linear(nn.Module):
    """`x W^T + b`, weight (out, in)."""

    def __init__(self, in_size: int, out_size: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
