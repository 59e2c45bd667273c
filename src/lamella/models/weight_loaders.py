"""`weight_loader` attributes of parameters, for vLLM-like loops that load a model tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamella.errors import CheckpointError
from lamella.layers.parameters import layout_of
from lamella.parallel.sharding import Split, shard_tensor


@dataclass(frozen=True)
class _Shard:
    """Checkpoint tensor that fills rows [start, stop) of a parameter; `splits` are this rank's indices in it."""

    name: str
    splits: tuple[Split, ...]
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class WeightLoader:
    """Copy one checkpoint tensor into a parameter: `parameter.weight_loader(parameter, tensor, "q")`.

    A tensor of a merged projection is identified by its name (`q_proj`), its name without `_proj` (`q`), or its index
    in the order of rows (0 or "0"). Without an identifier, the tensor fills the whole parameter; for a merged
    projection it is the concatenation of all its tensors.

    Attributes:
        path: path of the parameter, for errors.
        shards: tensors that fill the parameter, in the order of rows.
    """

    path: str
    shards: tuple[_Shard, ...]

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter, tensor: Tensor, shard_id: str | int | None = None) -> None:
        """Fill the parameter, or one shard of it.

        Args:
            parameter: the parameter to fill.
            tensor: full tensor of the checkpoint; this rank's shard is copied.
            shard_id: identifies the tensor in a merged projection; None for the whole parameter.

        Raises:
            CheckpointError: there is no such shard, or the tensor has another shape.
        """
        if shard_id is None and len(self.shards) > 1:
            sizes = [shard.splits[0].full for shard in self.shards]
            if sum(sizes) != tensor.shape[0]:
                raise self._shape_error(tensor, f"{sum(sizes)} rows, of {self._names()}, or a shard_id")
            for shard, part in zip(self.shards, tensor.split(sizes), strict=True):
                self._fill(parameter, part, shard)
            return
        self._fill(parameter, tensor, self.shards[0] if shard_id is None else self._find(shard_id))

    def _find(self, shard_id: str | int) -> _Shard:
        for index, shard in enumerate(self.shards):
            if str(shard_id) in (shard.name, shard.name.removesuffix("_proj"), str(index)):
                return shard
        raise CheckpointError(f"{self.path}: shard_id={shard_id!r}: there are {self._names()}")

    def _fill(self, parameter: nn.Parameter, tensor: Tensor, shard: _Shard) -> None:
        target = parameter[shard.start : shard.stop]
        full = (*(split.full for split in shard.splits), *target.shape[len(shard.splits) :])
        if tuple(tensor.shape) != full:
            raise self._shape_error(tensor, f"{full}, of {shard.name}")
        target.copy_(shard_tensor(tensor, shard.splits))

    def _names(self) -> str:
        return ", ".join(shard.name for shard in self.shards)

    def _shape_error(self, tensor: Tensor, needed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: a tensor of shape {tuple(tensor.shape)}, and the parameter takes {needed}"
        )


def attach_weight_loaders(model: nn.Module) -> None:
    """Set the attribute `weight_loader` of every parameter of a model."""
    modules = dict(model.named_modules())
    for path, parameter in model.named_parameters():
        owner, _, leaf = path.rpartition(".")
        name = owner.rpartition(".")[2] or path
        shards = (
            _Shard(part or name, splits, start, stop)
            for part, splits, start, stop in layout_of(modules[owner], leaf).tensors()
        )
        parameter.weight_loader = WeightLoader(path, tuple(shards))  # type: ignore[attr-defined]
