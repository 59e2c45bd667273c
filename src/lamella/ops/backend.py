"""Which implementation serves a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops import native


def use_native(x: Tensor) -> bool:
    """Whether the native CPU kernels serve `x`: they know two dtypes and no gradients."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and native.available()
    )
