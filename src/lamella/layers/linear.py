"""Projections and the embedding of the local engine, of which each rank holds its shard."""

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

# Whether all parts of a merged projection have a bias, or the names of those that have.
Biases: TypeAlias = bool | tuple[str, ...]


@dataclass(frozen=True)
class LinearShape:
    """A rank's shard of a projection, or of several projections of one input.

    Attributes:
        inputs: input channels.
        outputs: output channels, those of all `parts` side by side.
        parts: output channels of each of a file's projections, by name, in order; empty if there is one, which has the
            module's own name.
        dtype: of inputs and outputs.
        device: where the weights go.
    """

    inputs: Split
    outputs: Split
    parts: Mapping[str, Split]
    dtype: torch.dtype
    device: torch.device


class LinearMethod(Protocol):
    """A way for a projection to store its weight, fill it from files, and compute with it.

    One method may serve many projections. The bias is no part of it: it has the dtype of the inputs.
    """

    def create(self, shape: LinearShape) -> Mapping[str, tuple[nn.Parameter, ParameterLayout]]:
        """Return the parameters that stand for the weight, not filled, by name, with their layouts.

        The names are those of the file's tensors below a projection: `weight`, `weight_scale`.
        """
        ...

    def load(self, name: str, place: Tensor, splits: Sequence[Split], tensors: TensorReader) -> None:
        """Fill a part of a parameter.

        Args:
            name: the tensor in the file; others, such as a scale, may be read as well.
            place: the part of the parameter. Of a large parameter it may be some of the rows of a file's tensor.
            splits: the places of the tensor's leading dimensions that belong in `place`.
            tensors: the file's tensors, as they are stored.
        """
        ...

    def apply(self, linear: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x W^T + b`.

        Args:
            linear: the module with the parameters that `create` has made.
            x: (..., inputs).
            bias: (outputs,), or None.

        Returns:
            (..., outputs), in the dtype of x.
        """
        ...


class DenseMethod:
    """The weight (outputs, inputs) in the model's dtype."""

    def create(self, shape: LinearShape) -> Mapping[str, tuple[nn.Parameter, ParameterLayout]]:
        """See `LinearMethod.create`."""
        weight = torch.empty(shape.outputs.size, shape.inputs.size, dtype=shape.dtype, device=shape.device)
        return {"weight": (nn.Parameter(weight), ParameterLayout((shape.outputs, shape.inputs), shape.parts))}

    def load(self, name: str, place: Tensor, splits: Sequence[Split], tensors: TensorReader) -> None:
        """See `LinearMethod.load`; converts the dtype."""
        place.copy_(tensors.load(name, splits))

    def apply(self, linear: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearMethod.apply`."""
        return dense_linear(x, linear.weight, bias)


DENSE = DenseMethod()


class Linear(nn.Module):
    """`x W^T + b`; what stands for W is its method's affair.

    Attributes:
        shape: what the rank holds of the projection.
        method: how the weight is stored, filled and multiplied by.
        weight: (outputs, inputs) in the model's dtype if `dense_weight` is not None; else what the method makes it.
        layouts: see `lamella.layers.parameters`.
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
        # Without a function of its own, a parameter is copied from what the file's tensors stand for, with checks.
        is_copied = isinstance(method, DenseMethod) and type(method).load is DenseMethod.load
        load = None if is_copied else method.load
        self.layouts = {name: replace(layout, load=load) for name, (_, layout) in created.items()}
        self.bias = nn.Parameter(torch.empty(outputs.size, dtype=dtype, device=device)) if bias else None
        self.layouts["bias"] = ParameterLayout((outputs,), self.shape.parts)

    @property
    def dense_weight(self) -> Tensor | None:
        """The weight for kernels that read it in place of calling `forward`; None if they must not.

        A method that derives from `DenseMethod` and multiplies in another way, such as one with adapters, has none.
        """
        method = self.method
        return self.weight if isinstance(method, DenseMethod) and type(method).apply is DenseMethod.apply else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection (..., outputs) of x (..., inputs)."""
        return self.method.apply(self, x, self.bias)


class MergedLinear(Linear):
    """Several projections of one input as one product; a checkpoint holds them apart, under the names in `parts`.

    If only some have a bias, the bias of the others is zero and in no file.
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
    """Return the parts that have no bias, if others have one."""
    return () if isinstance(bias, bool) else tuple(part for part in parts if part not in bias)


class RowLinear(Linear):
    """A projection whose input is divided over the ranks: the sum of their products."""

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
        """Return the sum (..., outputs) over the ranks of the products with their x (..., inputs)."""
        bias = self.bias if self.group.partition.rank == 0 else None  # which the sum must hold once
        return self.group.all_reduce(self.method.apply(self, x, bias))


class Fp32Linear(Linear):
    """A dense projection without bias whose result is fp32 whatever the model's dtype: router scores, logits."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection (..., outputs) fp32 of x (..., inputs)."""
        return fp32_linear(x, self.weight)


class Head(Fp32Linear):
    """The last projection, to logits (..., vocab)."""


class SplitHead(Head):
    """`Head` with a shard of the vocabulary on each rank; all of them get all logits."""

    def __init__(self, inputs: Split, outputs: Split, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        super().__init__(inputs, outputs, False, dtype, device)
        self.vocab_size, self.group = outputs.full, group

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., vocab) of x (..., inputs)."""
        part = super().forward(x)
        missing = self.group.partition.vocabulary_part(self.vocab_size) - part.shape[-1]
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
        """Return the rows (..., hidden) of ids (...)."""
        return nn.functional.embedding(input_ids, self.weight)


class SplitEmbedding(Embedding):
    """`Embedding` with a shard of the vocabulary on each rank: rows of its tokens, zeros for others, and the sum."""

    def __init__(self, tokens: Split, hidden_size: int, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        super().__init__(tokens, hidden_size, dtype, device)
        ((self.start, self.stop),) = tokens.spans
        self.group = group

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows (..., hidden) of ids (...)."""
        others = (input_ids < self.start) | (input_ids >= self.stop)
        rows = super().forward((input_ids - self.start).masked_fill(others, 0))
        return self.group.all_reduce(rows.masked_fill(others[..., None], 0))
