"""Taps of the engine's model: forward hooks that pass the output of every operation through a `Tap`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lamella.layers.canon import Canon
from lamella.layers.linear import Embedding, Linear, MergedLinear
from lamella.layers.moe import Experts
from lamella.layers.norm import LayerNorm, RMSNorm
from lamella.layers.recurrent import RecurrentMixer
from lamella.layers.state_modules import PagedAttention
from lamella.ops.backend import separate_operations
from lamella.parity.sites import Tap

# The input of these projections comes from a function without a module, which is tapped in front of the projection.
FED_BY = {"down_proj": "activation"}


@contextmanager
def tapped(model: nn.Module, tap: Tap) -> Iterator[None]:
    """Pass the result of every operation of a lamella model through `tap` inside a `with` block.

    Fused operations are computed separately inside the block.
    """
    handles = []
    for path, module in model.named_modules():
        # A supernet's active mixer is the layer's mixer.
        site = re.sub(r"\.mixer\.mixers\.[^.]+", ".mixer", path.removeprefix("model."))
        if isinstance(module, RecurrentMixer):
            handles.append(module.output.register_forward_pre_hook(_fed(f"{site}.recurrence", tap)))
        if (hook := _hook(module, site, tap)) is not None:
            handles.append(module.register_forward_hook(hook))
        if (pre_hook := _pre_hook(module, site, tap)) is not None:
            handles.append(module.register_forward_pre_hook(pre_hook))
    try:
        with separate_operations():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, site: str, tap: Tap) -> Callable[..., Any] | None:
    """Return the forward hook of a module that is an operation, which taps the result as (n, channels); else None."""
    if isinstance(module, MergedLinear):
        parent, sizes = site.rpartition(".")[0], {name: split.size for name, split in module.parts.items()}

        def merged(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            pieces = output.split(list(sizes.values()), -1)
            return torch.cat([tap(f"{parent}.{name}", piece) for name, piece in zip(sizes, pieces, strict=True)], -1)

        return merged
    if isinstance(module, RMSNorm | LayerNorm):

        def norm(_: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                normed, total = output
                total = tap(f"{site}.residual", total)
                return tap(site, normed), total
            return _flat(site, output, tap)

        return norm
    if isinstance(module, Linear | Embedding | Canon | PagedAttention | Experts):
        return lambda _, args, output: _flat(site, output, tap)
    return None


def _pre_hook(module: nn.Module, site: str, tap: Tap) -> Callable[..., Any] | None:
    """Return the pre-forward hook of a module whose input comes from an operation without a module; else None."""
    parent, _, name = site.rpartition(".")
    if isinstance(module, PagedAttention):

        def seen(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            q, k, v = args
            sizes = [q.shape[1], k.shape[1]]
            return *_flat(f"{parent}.queries_keys", torch.cat((q, k), 1), tap).split(sizes, 1), v

        return seen
    return _fed(f"{parent}.{FED_BY[name]}", tap) if name in FED_BY else None


def _fed(site: str, tap: Tap) -> Callable[..., Any]:
    """Return a pre-forward hook that taps the module's only input as the result of the operation at `site`."""
    return lambda _, args: (tap(site, args[0]),)


def _flat(site: str, value: Tensor, tap: Tap) -> Tensor:
    """Pass `value` (n, ...) through the tap as (n, channels)."""
    return tap(site, value.reshape(value.shape[0], -1)).view(value.shape)
