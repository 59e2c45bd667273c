"""How our Triton kernels are launched, compiled or in Triton's interpreter."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def dependent_launch(x: Tensor) -> dict[str, Any]:
    """Keyword arguments that let a kernel on `x` start while the one ahead of it in the stream still runs.

    The kernel takes a constexpr `PDL`, and calls `wait_for_predecessor` before it touches anything that the kernel
    ahead of it may write ("programmatic dependent launch", compute capability 9.0 on).
    """
    if x.is_cuda and _has_dependent_launch(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


# Triton's own of these names are made for constants within kernels, and take ten times as long on the host.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n, and 1."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Wait until all that the kernel ahead has written can be read; only then may the kernel behind start.

    So when a kernel starts behind one that waits like this, everything is complete but that one: before its own wait it
    may read weights, and whatever was written earlier than by the kernel directly ahead of it. Every program of every
    kernel must wait.
    """
    wait(PDL)
    start_successor(PDL)


@triton.jit
def start_successor(PDL: tl.constexpr):
    """The kernel behind may start. Where this comes before the wait, it may read only weights before its own."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until all that the kernel ahead has written can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()
