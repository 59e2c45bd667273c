"""How our Triton kernels are launched, compiled or in Triton's interpreter."""

from __future__ import annotations

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
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Wait until all that the kernel ahead has written can be read; only then may the kernel behind start.

    So when a kernel starts, everything is complete but the one kernel directly ahead of it: before the wait it may
    read weights, and whatever was written two kernels ago or earlier. Every program of every kernel must wait.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
