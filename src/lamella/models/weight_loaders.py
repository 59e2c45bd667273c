"""`weight_loader` on parameters: how vLLM-like loading loops fill a model, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamella.errors import CheckpointError
from lamella.layers.parameters import layout_of
from lamella.parallel.sharding import Split, shard_tensor


@dataclass(frozen=True)
class _Shard:
    """One tensor of a file in a parameter: rows [start, stop), and what of the tensor goes there."""

    name: str
    splits: tuple[Split, ...]
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class WeightLoader:
    """Copies one tensor of a checkpoint to its place in a parameter: `parameter.weight_loader(parameter, tensor, "q")`.

    A merged projection's tensors are told apart by their names (`q_proj`), these without `_proj` (`q`), or their number
    in the order of the rows (0, "0"). Without any, the tensor is the whole parameter's, or of a merged one all of its
    tensors', one after the other.
    """

    path: str
    shards: tuple[_Shard, ...]

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter, tensor: Tensor, shard_id: str | int | None = None) -> None:
        """Fill the parameter's place for `tensor` (its full shape; a rank takes its part).

        Raises:
            CheckpointError: no such shard exists, or the tensor does not have its shape.
        """
        if shard_id is None and len(self.shards) > 1:
            sizes = [shard.splits[0].full for shard in self.shards]
            if sum(sizes) != tensor.shape[0]:
                raise self._misfit(tensor, f"{sum(sizes)} rows, of {self._names()}, or a shard_id")
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
        place = parameter[shard.start : shard.stop]
        full = (*(split.full for split in shard.splits), *place.shape[len(shard.splits) :])
        if tuple(tensor.shape) != full:
            raise self._misfit(tensor, f"{full}, of {shard.name}")
        place.copy_(shard_tensor(tensor, shard.splits))

    def _names(self) -> str:
        return ", ".join(shard.name for shard in self.shards)

    def _misfit(self, tensor: Tensor, needed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: a tensor of shape {tuple(tensor.shape)}, and the parameter takes {needed}"
        )


def attach_weight_loaders(model: nn.Module) -> None:
    """Give every parameter of a model its `weight_loader`."""
    modules = dict(model.named_modules())
    for path, parameter in model.named_parameters():
        owner, _, leaf = path.rpartition(".")
        name = owner.rpartition(".")[2] or path
        shards = (
            _Shard(part or name, splits, start, stop)
            for part, splits, start, stop in layout_of(modules[owner], leaf).tensors()
        )
        parameter.weight_loader = WeightLoader(path, tuple(shards))  # type: ignore[attr-defined]
