"""Choice of the implementation of an operation: a table of backends for each, in order of preference.

A package of `ops` declares an operation as a plain function with the operation's one signature, and a `BackendTable`
beside it. Every backend has that signature. The declared function asks `BackendTable.choose` for the first backend that
serves its inputs. The last one is the reference, which serves everything.

Backends are named after what computes:

=============  =====================================================================================================
`triton`       our GPU kernels
`native`       our C++ kernels for CPUs
`flashinfer`   the library of that name, for a part of what a Triton backend computes
`fla`          flash-linear-attention, likewise
`torch`        PyTorch's kernels in a fast form
`composed`     the operation's parts, one operation after the other
`reference`    plain fp32 torch, which defines the result
=============  =====================================================================================================
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lamella.ops import native

logger = logging.getLogger("lamella")

F = TypeVar("F", bound=Callable[..., Any])

PORTABLE = "portable"
"""Platform of a tensor that neither Triton nor the native kernels take: any device, under autograd, while tracing."""

_portable: ContextVar[bool] = ContextVar("portable_only", default=False)
_separate: ContextVar[bool] = ContextVar("separate_operations", default=False)


def platform(x: Tensor) -> str:
    """Return whose kernels may be used on `x`: "triton", "native" or `PORTABLE`.

    Our kernels know no gradients, and the native ones know two dtypes only. While torch.compile traces, plain torch
    serves everything, since that is what it can fuse.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _portable.get():
        return PORTABLE
    if x.is_cuda:
        return "triton" if has_triton() else PORTABLE
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and native.available():
        return "native"
    return PORTABLE


def use_triton(x: Tensor) -> bool:
    """Return whether our Triton kernels may be used on `x`."""
    return platform(x) == "triton"


def use_fused(x: Tensor) -> bool:
    """Return whether neighbouring operations on `x` are to be one kernel where there is one."""
    return platform(x) == "triton" and not _separate.get()


@cache
def has_triton() -> bool:
    """Return whether Triton can be imported; log a warning once if not."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        logger.warning("triton cannot be imported (%s): the GPU runs plain torch operations, which is slow", error)
        return False
    return True


@dataclass
class Backend:
    """One implementation of an operation.

    Attributes:
        name: what computes, see the module's docstring.
        load: returns the implementation, which has the operation's signature.
        limits: takes what `BackendTable.choose` is given, and says whether the backend serves it; None if its platform
            is all that it needs.
        within: the backend that uses this one for a part of its work, where it is not chosen by the table.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    limits: Callable[..., bool] | None = None
    within: str | None = None
    _loaded: Callable[..., Any] | None = None

    @property
    def run(self) -> Callable[..., Any]:
        """The implementation, loaded when first asked for."""
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platforms of the tensors that the backend takes."""
        return (self.name,) if self.name in ("triton", "native") else ("triton", "native", PORTABLE)


class BackendTable:
    """The backends of one operation, in the order in which they are asked.

    Attributes:
        name: the operation's, which is the name of the function that declares it in `module`.
        backends: those that `choose` walks, the reference last.
        parts: those that another backend uses for a part of its work.
    """

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module
        self.backends: list[Backend] = []
        self.parts: list[Backend] = []
        self._by_platform: dict[str, tuple[Backend, ...]] = {}
        TABLES.append(self)

    @property
    def declared(self) -> Callable[..., Any]:
        """The operation: the function whose signature every backend has."""
        return getattr(sys.modules[self.module], self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        """The implementation that defines the result."""
        return self.backends[-1].run

    def backend(
        self, name: str, limits: Callable[..., bool] | None = None, within: str | None = None
    ) -> Callable[[F], F]:
        """Return a decorator that registers an implementation behind those registered before; see `Backend`."""

        def register(run: F) -> F:
            self._add(Backend(name, lambda: run, limits, within, run))
            return run

        return register

    def lazy(
        self, name: str, limits: Callable[..., bool] | None = None, within: str | None = None
    ) -> Callable[[Callable[[], F]], Backend]:
        """Return a decorator like `backend`'s, for a function that imports the implementation and returns it."""

        def register(load: Callable[[], F]) -> Backend:
            return self._add(Backend(name, load, limits, within))

        return register

    def _add(self, backend: Backend) -> Backend:
        if backend.within is not None:
            self.parts.append(backend)
            return backend
        self.backends.append(backend)
        for each in ("triton", "native", PORTABLE):
            self._by_platform[each] = tuple(some for some in self.backends if each in some.platforms)
        return backend

    def choose(self, x: Tensor, *more: Any) -> Callable[..., Any]:
        """Return the first backend that serves the inputs: `x` gives the platform, and `more` goes to the limits."""
        for backend in self._by_platform[platform(x)]:
            if backend.limits is None or backend.limits(x, *more):
                return backend._loaded or backend.run
        raise AssertionError(f"{self.name}: no backend serves {x.dtype} on {x.device}")

    def get(self, name: str) -> Callable[..., Any]:
        """Return the backend of this name."""
        return next(backend.run for backend in (*self.backends, *self.parts) if backend.name == name)


TABLES: list[BackendTable] = []
"""Tables of the packages imported so far; `ops.catalogue` imports them all."""


@contextmanager
def separate_operations() -> Iterator[None]:
    """Within the block, in this thread, compute every operation by itself, so that its result can be seen."""
    token = _separate.set(True)
    try:
        yield
    finally:
        _separate.reset(token)


@contextmanager
def portable_only() -> Iterator[None]:
    """Within the block, in this thread, have plain torch serve everything."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)
