"""Launch of Triton kernels, compiled or in Triton's interpreter.

Programmatic dependent launch (PDL): what a kernel may read before its wait
---------------------------------------------------------------------------
A kernel launched with `dependent_launch` may start while earlier launches of its stream still run. The writes of those
launches are complete and visible only after its wait. Which launches may be unfinished depends on when the launch
directly ahead lets its successor start:

=======================================================  =====================================================
launch directly ahead                                    may be unfinished when this kernel starts
=======================================================  =====================================================
Triton kernel that calls `wait_for_predecessor`          that launch
Triton kernel that calls `start_successor` before        that launch, and all that may be unfinished when *it*
`wait` (products in `ops/linear`, `norm_short_conv`      starts
with `early`)
any other kernel (PyTorch's, FlashInfer's)               its writes, which may not be visible yet
=======================================================  =====================================================

Before its wait a kernel may therefore read

* weights and other constants;
* a step's inputs (slot mapping, block tables, slots, positions), which are copied to the device before the first layer,
  with the embedding kernel between;
* state of earlier tokens (cached keys and values, convolution history), for the same reason;
* an attention plan, after which `plan_decode` launches an ordinary kernel.

Everything that a layer computes within the step (projections, cos/sin, temperatures) must be read after the wait. This
holds even for values that are computed once for many layers, because the first layer's launch is directly ahead. A
kernel must not write before the wait, and at least one program of each kernel must wait.
`tests/ops/test_dependent_launch.py` checks these rules in Triton's interpreter, for a step of every kind of model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def dependent_launch(x: Tensor) -> dict[str, Any]:
    """Return launch arguments that let a kernel on `x` start while the kernel ahead in the stream still runs.

    The kernel must have a constexpr `PDL` and follow the rules of this module's docstring. Needs compute capability
    9.0.
    """
    if x.is_cuda and _has_dependent_launch(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


# Triton's functions of these names are made for constants in kernels, and take ten times as long on the host.


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n; at least 1."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Wait until all earlier launches are complete and visible, and then let the next kernel start."""
    wait(PDL)
    start_successor(PDL)


@triton.jit
def start_successor(PDL: tl.constexpr):
    """Let the next kernel start. Called before `wait`, it restricts what that kernel may read before its own wait."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until all earlier launches are complete and visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()
