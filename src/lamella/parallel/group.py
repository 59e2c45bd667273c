"""Sums and gathers over the ranks of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.ops import opaque
from lamella.parallel.sharding import Partition

# How long a rank waits for the others: longer than the slowest compiles a kernel, since nobody waits while idle.
TIMEOUT = timedelta(minutes=5)


class Group:
    """A rank alone, which has nothing to wait for.

    Attributes:
        partition: what is this rank's of a model.
    """

    def __init__(self, partition: Partition | None = None) -> None:
        self.partition = partition or Partition()
        self.handle: Tensor | None = None  # of a compiling engine, see ops.opaque

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same to the last bit on each; x may be overwritten."""
        return x

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """The sum of [x], untraced; x is left as it is."""
        (x,) = inputs
        return self.all_reduce(x.clone())

    def all_gather(self, x: Tensor) -> Tensor:
        """x (..., n) of all ranks side by side: (..., size * n)."""
        return x

    def smallest(self, value: int) -> int:
        """The least of all ranks' values."""
        return value

    def abort(self) -> None:
        """Make whoever waits for another rank give up; the group is of no use afterwards."""


class TensorParallelGroup(Group):
    """Ranks over NCCL on CUDA, over gloo on CPUs.

    It is a process group of its own, beside torch's default one, so that a process can have several engines and use
    `torch.distributed` for its own ends. Nothing listens outside the host.
    """

    def __init__(self, partition: Partition) -> None:
        """Knows its share at once; `connect` before anything is summed."""
        super().__init__(partition)
        self._group: Any = None

    def connect(self, folder: Path, device: torch.device) -> None:
        """Meet the other ranks, through a file in `folder`. Returns when all are there."""
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import AllgatherOptions

        assert device.type in ("cpu", "cuda")
        store, rank, size = (
            dist.FileStore(str(folder / "ranks"), self.partition.size),
            self.partition.rank,
            self.partition.size,
        )
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = TIMEOUT
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._group = dist.ProcessGroupGloo(store, rank, size, options)
        self._device = device
        self._sum, self._min, self._gather = dist.AllreduceOptions(), dist.AllreduceOptions(), AllgatherOptions()
        self._min.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
        for each in (self._sum, self._min, self._gather):
            each.asyncOp = False  # on the current stream, which a graph captures
        self.smallest(0)  # NCCL opens its channels with the first operation, which must not be in a graph

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.handle is not None and torch.compiler.is_compiling():
            return opaque.call(self.handle, "all_reduce", (x,), x.shape[-1])
        x = x.contiguous()
        _wait(self._group.allreduce([x], self._sum))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        every = x.new_empty(self.partition.size * x.numel())
        _wait(self._group._allgather_base(every, x.contiguous().flatten(), self._gather))
        return every.view(self.partition.size, *x.shape).movedim(0, -2).flatten(-2)

    def smallest(self, value: int) -> int:
        least = torch.tensor([value], device=self._device)
        _wait(self._group.allreduce([least], self._min))
        return int(least)

    def abort(self) -> None:
        if self._group is not None and self._device.type == "cuda":  # gloo's ranks notice by themselves
            self._group.abort()


def _wait(work: Any) -> None:
    """For a collective's result; one that NCCL has put on the current stream may have no handle, nor need one."""
    if work is not None:
        work.wait()
