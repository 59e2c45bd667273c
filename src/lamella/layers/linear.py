"""Projections, head and embedding of the local engine; each rank holds its shard of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lamella.layers.parameters import ParameterLayout, TensorReader
from lamella.ops.linear import fp32_linear
from lamella.ops.linear import linear as dense_linear
from lamella.parallel.group import Group
from lamella.parallel.sharding import Split

# True or False for all parts of a merged projection, or the names of the parts that have a bias.
Biases: TypeAlias = bool | tuple[str, ...]


@dataclass(frozen=True)
class LinearShape:
    """A rank's shard of a projection, or of several projections of one input.

    Attributes:
        inputs: input channels of this rank.
        outputs: output channels of this rank, concatenated over all `parts`.
        parts: output channels by the checkpoint's projection names, in order; empty for a single projection, whose
            tensors have the module's name.
        dtype: dtype of inputs and outputs.
        device: device of the weights.
    """

    inputs: Split
    outputs: Split
    parts: Mapping[str, Split]
    dtype: torch.dtype
    device: torch.device


class LinearMethod(Protocol):
    """Storage format of a projection's weight, with its loading and its matrix product.

    One method object may serve many projections. The bias is not part of the method; it has the dtype of the inputs.
    """

    def create(self, shape: LinearShape) -> Mapping[str, tuple[nn.Parameter, ParameterLayout]]:
        """Allocate the parameters that represent the weight.

        Args:
            shape: the rank's shard of the projection.

        Returns:
            Uninitialized parameters and their layouts by name. The names are the last part of the checkpoint's tensor
            names, such as `weight` and `weight_scale`.
        """
        ...

    def load(self, name: str, target: Tensor, splits: Sequence[Split], tensors: TensorReader) -> None:
        """Fill a slice of a parameter from a checkpoint tensor.

        Args:
            name: name of the checkpoint tensor. The method may read related tensors as well, such as scales.
            target: the slice to fill. A large parameter is filled in several slices of rows.
            splits: indices along the leading dimensions of the checkpoint tensor that belong in `target`.
            tensors: reader of the checkpoint's tensors as stored.
        """
        ...

    def apply(self, linear: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x W^T + b`.

        Args:
            linear: module with the parameters that `create` returned.
            x: (..., inputs).
            bias: (outputs,), or None.

        Returns:
            (..., outputs) in the dtype of `x`.
        """
        ...


class DenseMethod:
    """Dense weight (outputs, inputs) in the model's dtype."""

    def create(self, shape: LinearShape) -> Mapping[str, tuple[nn.Parameter, ParameterLayout]]:
        """See `LinearMethod.create`."""
        weight = torch.empty(shape.outputs.size, shape.inputs.size, dtype=shape.dtype, device=shape.device)
        return {"weight": (nn.Parameter(weight), ParameterLayout((shape.outputs, shape.inputs), shape.parts))}

    def load(self, name: str, target: Tensor, splits: Sequence[Split], tensors: TensorReader) -> None:
        """See `LinearMethod.load`; converts the dtype."""
        target.copy_(tensors.load(name, splits))

    def apply(self, linear: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearMethod.apply`."""
        return dense_linear(x, linear.weight, bias)


DENSE = DenseMethod()


class Linear(nn.Module):
    """Linear projection `x W^T + b` whose weight is stored and multiplied by a `LinearMethod`.

    Attributes:
        shape: this rank's shard of the projection.
        method: storage format and matrix product of the weight.
        weight: (outputs, inputs) in the model's dtype if `dense_weight` is not None; otherwise defined by the method.
        layouts: layouts of the parameters, see `lamella.layers.parameters`.
    """

    weight: nn.Parameter

    def __init__(
        self,
        inputs: Split,
        outputs: Split,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        method: LinearMethod = DENSE,
        parts: Mapping[str, Split] | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.method = LinearShape(inputs, outputs, parts or {}, dtype, device), method
        created = method.create(self.shape)
        for name, (parameter, _) in created.items():
            self.register_parameter(name, parameter)
        # Dense parameters need no load function: the loader dequantizes and copies the file's tensors, with checks.
        is_copied = isinstance(method, DenseMethod) and type(method).load is DenseMethod.load
        load = None if is_copied else method.load
        self.layouts = {name: replace(layout, load=load) for name, (_, layout) in created.items()}
        self.bias = nn.Parameter(torch.empty(outputs.size, dtype=dtype, device=device)) if bias else None
        self.layouts["bias"] = ParameterLayout((outputs,), self.shape.parts)

    @property
    def dense_weight(self) -> Tensor | None:
        """The dense weight, for kernels that read it instead of calling `forward`; None if they must call `forward`.

        A subclass of `DenseMethod` that overrides `apply`, such as one with LoRA adapters, must be called.
        """
        method = self.method
        return self.weight if isinstance(method, DenseMethod) and type(method).apply is DenseMethod.apply else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection (..., outputs) of x (..., inputs)."""
        return self.method.apply(self, x, self.bias)


class MergedLinear(Linear):
    """Several projections of one input, computed as one matrix product.

    A checkpoint stores them as separate tensors, under the names in `parts`. If only some parts have a bias, the bias
    of the others is zero and is not stored.
    """

    def __init__(
        self,
        inputs: Split,
        parts: Mapping[str, Split],
        bias: Biases,
        dtype: torch.dtype,
        device: torch.device,
        method: LinearMethod = DENSE,
    ) -> None:
        self.parts, unbiased = dict(parts), without_bias(parts, bias)
        super().__init__(inputs, Split.join(parts.values()), bool(bias), dtype, device, method, self.parts)
        if unbiased and self.bias is not None:
            self.layouts["bias"] = replace(self.layouts["bias"], unstored=unbiased)
            with torch.no_grad():
                self.bias.zero_()


def without_bias(parts: Iterable[str], bias: Biases) -> tuple[str, ...]:
    """Return the names of the parts without a bias if only some parts have one; otherwise an empty tuple."""
    return () if isinstance(bias, bool) else tuple(part for part in parts if part not in bias)


class RowLinear(Linear):
    """Row-parallel projection: input channels are divided over the ranks, and the products are summed."""

    def __init__(
        self,
        inputs: Split,
        outputs: Split,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: Group,
        method: LinearMethod = DENSE,
    ) -> None:
        super().__init__(inputs, outputs, bias, dtype, device, method)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection (..., outputs), summed over the ranks, of this rank's channels x (..., inputs)."""
        bias = self.bias if self.group.partition.rank == 0 else None  # the sum over ranks must include it once
        return self.group.all_reduce(self.method.apply(self, x, bias))


class Fp32Linear(Linear):
    """Dense projection without bias whose output is always fp32, for router scores and logits."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection (..., outputs) of x (..., inputs), in fp32."""
        return fp32_linear(x, self.weight)


class Head(Fp32Linear):
    """Language model head: projection to logits (..., vocab) in fp32."""


class SplitHead(Head):
    """`Head` with a shard of the vocabulary on each rank; every rank gets the logits of the whole vocabulary."""

    def __init__(self, inputs: Split, outputs: Split, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        super().__init__(inputs, outputs, False, dtype, device)
        self.vocab_size, self.group = outputs.full, group

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., vocab) of x (..., inputs) in fp32."""
        part = super().forward(x)
        missing = self.group.partition.vocabulary_shard_size(self.vocab_size) - part.shape[-1]
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
        """Return the embeddings (..., hidden) of ids (...)."""
        return nn.functional.embedding(input_ids, self.weight)


class SplitEmbedding(Embedding):
    """`Embedding` with a shard of the vocabulary on each rank.

    A rank looks up the tokens of its shard and uses zeros for the others; the results are summed over the ranks.
    """

    def __init__(self, tokens: Split, hidden_size: int, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        super().__init__(tokens, hidden_size, dtype, device)
        ((self.start, self.stop),) = tokens.spans
        self.group = group

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings (..., hidden) of ids (...)."""
        others = (input_ids < self.start) | (input_ids >= self.stop)
        rows = super().forward((input_ids - self.start).masked_fill(others, 0))
        return self.group.all_reduce(rows.masked_fill(others[..., None], 0))
