"""Choice of an operation's implementation: one table of backends per operation, in order of preference.

A package of `ops` declares an operation as a plain function and a `BackendTable`. Every backend has the signature of
the declared function, which calls the first backend that supports its inputs (`BackendTable.choose`). The last backend
is the reference, which supports everything.

Names of backends:

=============  =====================================================================================================
`triton`       lamella's GPU kernels
`native`       lamella's C++ kernels for CPUs
`flashinfer`   the FlashInfer library, for some of the work of a Triton backend
`fla`          flash-linear-attention, for some of the work of a Triton backend
`torch`        PyTorch's kernels in a fast form
`composed`     a sequence of other operations
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
"""Platform of tensors that neither Triton nor the native kernels support: other devices, autograd, tracing."""

_portable: ContextVar[bool] = ContextVar("portable_only", default=False)
_separate: ContextVar[bool] = ContextVar("separate_operations", default=False)


def platform(x: Tensor) -> str:
    """Return the kernels that may be used on `x`: "triton", "native" or `PORTABLE`.

    lamella's kernels have no gradients, and the native kernels support two dtypes only. While torch.compile traces,
    plain torch computes everything, because torch.compile can fuse it.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _portable.get():
        return PORTABLE
    if x.is_cuda:
        return "triton" if has_triton() else PORTABLE
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and native.available():
        return "native"
    return PORTABLE


def use_triton(x: Tensor) -> bool:
    """Return True if lamella's Triton kernels may be used on `x`."""
    return platform(x) == "triton"


def use_fused(x: Tensor) -> bool:
    """Return True if consecutive operations on `x` may be computed by one fused kernel."""
    return platform(x) == "triton" and not _separate.get()


@cache
def has_triton() -> bool:
    """Return True if Triton can be imported; log a warning once if not."""
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
        name: name of the backend, see the module's docstring.
        load: returns the implementation, which has the operation's signature.
        limits: given the arguments of `BackendTable.choose`, returns True if the backend supports them; None if it
            supports everything on its platforms.
        within: name of the backend that uses this one for some of its work; such a backend is not chosen by the table.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    limits: Callable[..., bool] | None = None
    within: str | None = None
    _loaded: Callable[..., Any] | None = None

    @property
    def run(self) -> Callable[..., Any]:
        """The implementation; loaded on first access."""
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platforms that the backend supports."""
        return (self.name,) if self.name in ("triton", "native") else ("triton", "native", PORTABLE)


class BackendTable:
    """Backends of one operation, in order of preference.

    Attributes:
        name: name of the operation, and of the function in `module` that declares it.
        module: module that declares the operation.
        backends: backends for `choose`, with the reference last.
        parts: backends that other backends use for some of their work.
    """

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module
        self.backends: list[Backend] = []
        self.parts: list[Backend] = []
        self._by_platform: dict[str, tuple[Backend, ...]] = {}
        TABLES.append(self)

    @property
    def declared(self) -> Callable[..., Any]:
        """The function that declares the operation; every backend has its signature."""
        return getattr(sys.modules[self.module], self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        """The implementation that defines the result."""
        return self.backends[-1].run

    def backend(
        self, name: str, limits: Callable[..., bool] | None = None, within: str | None = None
    ) -> Callable[[F], F]:
        """Return a decorator that registers an implementation after those registered before; see `Backend`."""

        def register(run: F) -> F:
            self._add(Backend(name, lambda: run, limits, within, run))
            return run

        return register

    def lazy(
        self, name: str, limits: Callable[..., bool] | None = None, within: str | None = None
    ) -> Callable[[Callable[[], F]], Backend]:
        """Return a decorator like `backend`, for a function that imports and returns the implementation."""

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
        """Return the implementation of the first backend that supports the inputs.

        Args:
            x: tensor that decides the platform.
            more: further arguments for `Backend.limits`.
        """
        for backend in self._by_platform[platform(x)]:
            if backend.limits is None or backend.limits(x, *more):
                return backend._loaded or backend.run
        raise AssertionError(f"{self.name}: no backend serves {x.dtype} on {x.device}")

    def get(self, name: str) -> Callable[..., Any]:
        """Return the implementation of the backend with this name."""
        return next(backend.run for backend in (*self.backends, *self.parts) if backend.name == name)


TABLES: list[BackendTable] = []
"""Tables of the packages that have been imported; `ops.catalogue` imports all of them."""


@contextmanager
def separate_operations() -> Iterator[None]:
    """Turn fused kernels off in this thread inside a `with` block, so that each operation's result can be observed."""
    token = _separate.set(True)
    try:
        yield
    finally:
        _separate.reset(token)


@contextmanager
def portable_only() -> Iterator[None]:
    """Use only plain torch backends in this thread inside a `with` block."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)
