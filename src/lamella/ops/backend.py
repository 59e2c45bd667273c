"""Which implementation serves a tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from lamella.ops import native

logger = logging.getLogger("lamella")

_portable: ContextVar[bool] = ContextVar("portable_only", default=False)
_separate: ContextVar[bool] = ContextVar("separate_operations", default=False)


def use_native(x: Tensor) -> bool:
    """Whether the native CPU kernels serve `x`: they know two dtypes and no gradients.

    While torch.compile traces, plain torch serves everything, since that is what it can fuse.
    """
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not _portable.get()
        and native.available()
    )


def use_triton(x: Tensor) -> bool:
    """Whether our Triton kernels serve `x`: on a GPU, without gradients."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return not _portable.get() and has_triton()


def use_fused(x: Tensor) -> bool:
    """Whether neighbouring operations on `x` are to be one kernel where there is one."""
    return use_triton(x) and not _separate.get()


@cache
def has_triton() -> bool:
    """Whether our GPU kernels can be used at all; a log line says so if not."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        logger.warning("triton cannot be imported (%s): the GPU runs plain torch operations, which is slow", error)
        return False
    return True


@contextmanager
def separate_operations() -> Iterator[None]:
    """Within the block, in this thread, every operation is computed by itself, so that its result can be seen."""
    token = _separate.set(True)
    try:
        yield
    finally:
        _separate.reset(token)


@contextmanager
def portable_only() -> Iterator[None]:
    """Within the block, in this thread, plain torch serves everything."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)
