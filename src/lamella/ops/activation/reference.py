"""Activations in plain torch. There is no fused backend, because few models use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": lambda x: x.sigmoid(),
    "identity": lambda x: x,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 + 0.5 * torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))),
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu6": F.relu6,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "tanh": lambda x: x.tanh(),
}


def activate(x: Tensor, name: str, gated: bool) -> Tensor:
    """Apply an activation in fp32, and round once.

    Args:
        x: (T, I), or (T, 2 * I) = [gate | up] if `gated`.
        name: name of the activation in `ACTIVATIONS`.
        gated: whether to return `act(gate) * up` instead of `act(x)`.

    Returns:
        (T, I) in the dtype of x.
    """
    function = ACTIVATIONS[name]
    if not gated:
        return function(x.float()).to(x.dtype)
    gate, up = x.float().chunk(2, -1)
    return (function(gate) * up).to(x.dtype)
