"""A race detector for programmatic dependent launch, in Triton's interpreter.

It records, for each launch of a step, the addresses that programs read before their wait and the addresses that the
launch writes, and applies the rules of `lamella.ops.launch`: a read before the wait must not meet a write of a launch
that may be unfinished when the reader starts.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_HORIZON = 64  # launches back in the stream; chains of early starts are far shorter


@dataclass
class Launch:
    """One kernel in the stream.

    Attributes:
        dependent: whether it was launched with PDL; PyTorch's own kernels are not.
        starts_successor_early: whether some program lets the next kernel start before it waits.
        waits: whether at least one program waits.
        arguments: (name, first byte, last byte) of each tensor argument.
    """

    name: str
    dependent: bool
    starts_successor_early: bool = False
    waits: bool = False
    early_reads: list[np.ndarray] = field(default_factory=list)
    writes: list[np.ndarray] = field(default_factory=list)
    arguments: list[tuple[str, int, int]] = field(default_factory=list)

    def name_of(self, address: int) -> str:
        """Return the argument that an address belongs to."""
        names = [name for name, first, end in self.arguments if first <= address < end]
        return "/".join(names) or "?"


class Detector:
    """Records a stream of launches and collects the hazards among them.

    Attributes:
        hazards: one line each, with how often it occurred.
        launches: how often each kernel was launched with PDL.
    """

    def __init__(self) -> None:
        self.hazards: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._stream: deque[Launch] = deque(maxlen=_HORIZON)
        self._current: Launch | None = None
        self._waited = False

    def begin(self, launch: Launch) -> None:
        """Record the reads and writes of `launch` from now on."""
        self._current = launch

    def begin_program(self) -> None:
        """Start another program of the current launch."""
        self._waited = False

    def end(self) -> None:
        """Check the current launch against those ahead of it."""
        launch, self._current = self._current, None
        assert launch is not None
        if launch.dependent:
            self.launches[launch.name] += 1
            if not launch.waits:
                self.hazards[f"{launch.name}: no program waits"] += 1
            self._check_early_reads(launch)
        self._stream.append(launch)

    def add_plain(self, name: str, writes: list[np.ndarray]) -> None:
        """Record a kernel of PyTorch's. Those launched inside another launch are the interpreter's own."""
        if self._current is None:
            self._stream.append(Launch(name, dependent=False, writes=writes))

    def read(self, addresses: np.ndarray) -> None:
        if self._current is not None and not self._waited:
            self._current.early_reads.append(addresses)

    def write(self, addresses: np.ndarray) -> None:
        if self._current is not None:
            self._current.writes.append(addresses)
            if self._current.dependent and not self._waited:
                self.hazards[f"{self._current.name}: writes before its wait"] += 1

    def wait(self) -> None:
        self._waited = True
        if self._current is not None:
            self._current.waits = True

    def start_successor(self) -> None:
        if self._current is not None and not self._waited:
            self._current.starts_successor_early = True

    def _check_early_reads(self, launch: Launch) -> None:
        if not launch.early_reads:
            return
        reads = np.unique(np.concatenate(launch.early_reads))
        for ahead in reversed(self._stream):
            writes = np.concatenate(ahead.writes) if ahead.writes else np.empty(0, np.uint64)
            names = sorted({launch.name_of(int(address)) for address in np.intersect1d(reads, writes)})
            for name in names:
                self.hazards[f"{launch.name}: reads {name} before its wait, which {ahead.name} writes"] += 1
            if not (ahead.dependent and ahead.starts_successor_early):
                return


def _addresses(tensor: Tensor) -> np.ndarray:
    """Return the addresses of a tensor's elements."""
    offsets = np.zeros(1, np.uint64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size, dtype=np.uint64) * np.uint64(stride)).reshape(-1)
    return offsets * np.uint64(tensor.element_size()) + np.uint64(tensor.data_ptr())


def _selected(pointers: Any, mask: Any) -> np.ndarray:
    return np.asarray(pointers.data)[np.asarray(mask.data, bool)].reshape(-1).astype(np.uint64)


class _PlainKernels(TorchDispatchMode):
    """Report every kernel that PyTorch would launch on a GPU to a detector."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.name():
            return result
        results = result if isinstance(result, tuple | list) else [result]
        tensors = [item for item in results if isinstance(item, Tensor) and item.numel()]
        if tensors:
            self.detector.add_plain(func.name(), [_addresses(tensor) for tensor in tensors])
        return result


@contextmanager
def detect_races(monkeypatch: pytest.MonkeyPatch) -> Iterator[Detector]:
    """Record every launch inside the block, with every Triton kernel that supports PDL launched with it.

    The interpreter normally works on copies of its arguments; here it gets the tensors, so that addresses tell which
    launch writes what another reads.
    """
    detector = Detector()
    for name, module in list(sys.modules.items()):
        if name.startswith("lamella.") and hasattr(module, "dependent_launch"):
            monkeypatch.setattr(module, "dependent_launch", lambda x: {"PDL": True})
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    add, swap = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    set_program, run = InterpreterBuilder.set_grid_idx, GridExecutor.__call__

    def recorded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        detector.read(_selected(pointers, mask))
        return load(self, pointers, mask, *rest)

    def recorded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        detector.write(_selected(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def recorded_add(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        detector.write(_selected(pointers, mask))
        return add(self, operation, pointers, value, mask, *rest)

    def recorded_swap(self: Any, pointers: Any, *rest: Any) -> Any:
        detector.write(np.asarray(pointers.data).reshape(-1).astype(np.uint64))
        return swap(self, pointers, *rest)

    def recorded_program(self: Any, *index: int) -> Any:
        detector.begin_program()
        return set_program(self, *index)

    def recorded_run(self: Any, *args: Any, **kwargs: Any) -> None:
        launch = Launch(self.fn.__name__, bool(kwargs.get("PDL")))
        given = dict(zip(inspect.getfullargspec(self.fn).args, args, strict=False)) | kwargs
        for name, value in given.items():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                launch.arguments.append((name, value.data_ptr(), storage.data_ptr() + storage.nbytes()))
        detector.begin(launch)
        run(self, *args, **kwargs)
        detector.end()

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recorded_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", recorded_store)
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", recorded_add)
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_cas", recorded_swap)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", recorded_program)
    monkeypatch.setattr(GridExecutor, "__call__", recorded_run)
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (list(args), dict(kwargs)))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *args: None)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda *args, **kwargs: detector.wait())
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda *args, **kwargs: detector.start_successor())
    with _PlainKernels(detector), torch.inference_mode():
        yield detector
