"""How our Triton kernels are launched, compiled or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dependent_launch(x: Tensor) -> dict[str, Any]:
    """Keyword arguments that let a kernel on `x` start before the one ahead of it in the stream has ended.

    The kernel must take a constexpr `PDL`, and where that is set call `gdc_launch_dependents` at its start and
    `gdc_wait` before it touches anything but weights ("programmatic dependent launch", compute capability 9.0 on).
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
