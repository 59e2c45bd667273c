"""List of all operations with their backends, and whether each backend can run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

from lamella.ops import native
from lamella.ops.backend import TABLES, BackendTable, has_triton

_PACKAGES = (
    "attention delta_rule gated_rms_norm linear moe qkv rms_norm rotary sampling selective_scan short_conv swiglu"
).split()


class Entry(NamedTuple):
    """Backend of an operation.

    Attributes:
        op: name of the operation.
        backend: name of the backend, see `ops.backend`.
        missing: reason why it cannot run here; None if it can.
    """

    op: str
    backend: str
    missing: str | None


def tables() -> Sequence[BackendTable]:
    """Return the tables of all operations, sorted by name."""
    for name in _PACKAGES:
        import_module(f"lamella.ops.{name}")
    return sorted(TABLES, key=lambda table: table.name)


def entries() -> list[Entry]:
    """Return every backend of every operation, in order of preference."""
    return [
        Entry(table.name, backend.name, why_missing(backend.name))
        for table in tables()
        for backend in (*table.backends, *table.parts)
    ]


@cache
def why_missing(backend: str) -> str | None:
    """Return a short reason why a backend cannot run on this machine; None if it can."""
    if backend == "native":
        return native.why_unavailable()
    if backend in ("torch", "composed", "reference"):
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if backend == "triton":
        return None if has_triton() else "triton cannot be imported"
    return None if find_spec(backend) is not None else "not installed (pip install 'lamella[gpu]')"
