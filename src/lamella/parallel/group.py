"""Collective operations over the ranks of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import WorkerError
from lamella.ops import opaque
from lamella.parallel.sharding import Partition

# Maximum wait in a collective. It must exceed the longest kernel compilation; idle ranks do not wait in a collective.
TIMEOUT = timedelta(minutes=5)


class Group:
    """Group of one rank, and the interface of larger groups.

    Attributes:
        partition: position of this rank, and its shards of a model.
        handle: handle for compiled programs, see `lamella.ops.opaque`; None unless an engine compiles.
    """

    def __init__(self, partition: Partition | None = None) -> None:
        self.partition = partition or Partition()
        self.handle: Tensor | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks, bitwise equal on each rank; x may be overwritten."""
        return x

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return the sum of inputs [x] over all ranks without changing x; called when the opaque operation runs."""
        (x,) = inputs
        return self.all_reduce(x.clone())

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the tensors x (..., n) of all ranks, concatenated: (..., size * n)."""
        return x

    def all_reduce_min(self, value: int) -> int:
        """Return the minimum of `value` over all ranks."""
        return value

    def abort(self) -> None:
        """Abort pending collectives of this rank; the group cannot be used afterwards."""


class TensorParallelGroup(Group):
    """Group of several ranks, over NCCL on CUDA and over gloo on CPUs.

    It uses its own process group instead of torch's default one, so that a process can have several engines and can use
    `torch.distributed` itself. No socket is reachable from outside the host.
    """

    def __init__(self, partition: Partition) -> None:
        """Set the partition; call `connect` before the first collective."""
        super().__init__(partition)
        self._group: Any = None

    def connect(self, folder: Path, device: torch.device) -> None:
        """Connect to the other ranks, and return when all are connected.

        Args:
            folder: folder for the rendezvous file, the same for all ranks.
            device: CPU or CUDA device of this rank.
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import AllgatherOptions

        assert device.type in ("cpu", "cuda")
        store, rank, size = (
            dist.FileStore(str(folder / "ranks"), self.partition.size),
            self.partition.rank,
            self.partition.size,
        )
        with _worker_errors():
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
            each.asyncOp = False  # run on the current stream, so that CUDA graphs can capture it
        self.all_reduce_min(0)  # NCCL sets up channels in the first collective, which a CUDA graph must not capture

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks; x may be overwritten."""
        if self.handle is not None and torch.compiler.is_compiling():
            return opaque.call(self.handle, "all_reduce", (x,), x.shape[-1])
        x = x.contiguous()
        _wait(self._group.allreduce([x], self._sum))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the tensors x (..., n) of all ranks, concatenated: (..., size * n)."""
        every = x.new_empty(self.partition.size * x.numel())
        _wait(self._group._allgather_base(every, x.contiguous().flatten(), self._gather))
        return every.view(self.partition.size, *x.shape).movedim(0, -2).flatten(-2)

    def all_reduce_min(self, value: int) -> int:
        """Return the minimum of `value` over all ranks."""
        least = torch.tensor([value], device=self._device)
        _wait(self._group.allreduce([least], self._min))
        return int(least)

    def abort(self) -> None:
        """Abort pending collectives of this rank; the group cannot be used afterwards."""
        if self._group is not None and self._device.type == "cuda":  # gloo detects closed connections itself
            self._group.abort()


def _wait(work: Any) -> None:
    """Wait for a collective. NCCL returns None if it has enqueued the collective on the current stream.

    Raises:
        WorkerError: another rank has ended, or did not take part within the time limit.
    """
    if work is not None:
        with _worker_errors():
            work.wait()


@contextmanager
def _worker_errors() -> Iterator[None]:
    """Turn the errors of torch's process groups inside the block into `WorkerError`."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise WorkerError(f"the tensor-parallel ranks could not exchange data ({reason}); make a new engine") from error
