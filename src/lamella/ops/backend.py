"""Which implementation serves a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from lamella.ops import native

_portable: ContextVar[bool] = ContextVar("portable_only", default=False)


def use_native(x: Tensor) -> bool:
    """Whether the native CPU kernels serve `x`: they know two dtypes and no gradients."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not _portable.get()
        and native.available()
    )


@contextmanager
def portable_only() -> Iterator[None]:
    """Within the block, in this thread, plain torch serves everything."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)
