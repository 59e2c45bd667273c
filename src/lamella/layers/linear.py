"""Projections and the embedding of the local engine, each with what its rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lamella.layers.parameters import ParameterLayout
from lamella.ops.linear import linear, wide_linear
from lamella.parallel.group import Group
from lamella.parallel.sharding import Split

# Whether all parts of a merged projection have a bias, or the names of those that have.
Biases: TypeAlias = bool | tuple[str, ...]


class Linear(nn.Module):
    """`x W^T + b`, weight (out, in).

    Attributes:
        layouts: see `lamella.layers.parameters`.
    """

    def __init__(self, inputs: Split, outputs: Split, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs.size, inputs.size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(outputs.size, dtype=dtype, device=device)) if bias else None
        self.layouts = {"weight": ParameterLayout((outputs, inputs)), "bias": ParameterLayout((outputs,))}

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class MergedLinear(Linear):
    """Several projections of one input as one product; a checkpoint holds them apart, under the names in `parts`.

    Where only some have a bias, that of the others is zero and stands in no file.
    """

    def __init__(
        self, inputs: Split, parts: Mapping[str, Split], bias: Biases, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(inputs, Split.join(parts.values()), bool(bias), dtype, device)
        self.parts, unbiased = dict(parts), without_bias(parts, bias)
        weight, biases = self.layouts["weight"], self.layouts["bias"]
        self.layouts = {
            "weight": replace(weight, parts=self.parts),
            "bias": replace(biases, parts=self.parts, unstored=unbiased),
        }
        if unbiased:
            assert self.bias is not None
            with torch.no_grad():
                self.bias.zero_()


def without_bias(parts: Iterable[str], bias: Biases) -> tuple[str, ...]:
    """The parts that have no bias beside others that have one."""
    return () if isinstance(bias, bool) else tuple(part for part in parts if part not in bias)


class RowLinear(Linear):
    """A projection whose input is spread over the ranks: the sum of what each makes of its part."""

    def __init__(
        self, inputs: Split, outputs: Split, bias: bool, dtype: torch.dtype, device: torch.device, group: Group
    ) -> None:
        super().__init__(inputs, outputs, bias, dtype, device)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.group.share.rank == 0 else None  # which the sum must hold once
        return self.group.all_reduce(linear(x, self.weight, bias))


class WideLinear(Linear):
    """A projection without bias whose result is fp32 whatever the model's dtype, since something is decided by it."""

    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight)


class Head(WideLinear):
    """The last projection, to logits (..., vocab)."""


class SplitHead(Head):
    """The same where each rank has a part of the vocabulary; all of them get all logits."""

    def __init__(self, inputs: Split, outputs: Split, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        super().__init__(inputs, outputs, False, dtype, device)
        self.vocab_size, self.group = outputs.full, group

    def forward(self, x: Tensor) -> Tensor:
        part = super().forward(x)
        missing = self.group.share.vocabulary_part(self.vocab_size) - part.shape[-1]
        if missing:
            part = nn.functional.pad(part, (0, missing))
        return self.group.all_gather(part)[..., : self.vocab_size].contiguous()


class Embedding(nn.Module):
    """Token embedding, weight (vocab, hidden)."""

    def __init__(self, tokens: Split, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens.size, hidden_size, dtype=dtype, device=device))
        self.layouts = {"weight": ParameterLayout((tokens,))}

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.embedding(input_ids, self.weight)


class SplitEmbedding(Embedding):
    """The same where each rank has a part of the vocabulary: its own tokens' rows, zeros for others, and the sum."""

    def __init__(self, tokens: Split, hidden_size: int, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        super().__init__(tokens, hidden_size, dtype, device)
        ((self.start, self.stop),) = tokens.spans
        self.group = group

    def forward(self, input_ids: Tensor) -> Tensor:
        others = (input_ids < self.start) | (input_ids >= self.stop)
        rows = super().forward((input_ids - self.start).masked_fill(others, 0))
        return self.group.all_reduce(rows.masked_fill(others[..., None], 0))
