"""Modules of a layer's parts, built from their configs.

In-tree configs are data only: a table here says which module each becomes. A config of another package has no entry in
the table and builds its module itself, by a method `build` with the arguments of `build`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn

from lamella.config import (
    AttentionConfig,
    FeedForwardConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    MambaConfig,
    MixerConfig,
    MLPConfig,
    MoEConfig,
    StochasticConfig,
)
from lamella.errors import ConfigError
from lamella.layers.attention import Attention
from lamella.layers.feed_forward import MLP
from lamella.layers.gated_delta_net import GatedDeltaNet
from lamella.layers.kimi_delta import KimiDelta
from lamella.layers.kit import Kit
from lamella.layers.mamba import Mamba
from lamella.layers.moe import MoE
from lamella.layers.short_conv import ConvHistory
from lamella.layers.supernet.stochastic import Stochastic

# (config, kit, hidden_size, prefix, history) -> module
Builder: TypeAlias = Callable[[Any, Kit, int, str, ConvHistory | None], nn.Module]


@runtime_checkable
class BuildsItself(Protocol):
    """A config of another package, which knows its own module."""

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: ConvHistory | None) -> nn.Module:
        """Return the module, see `lamella.layers.build.build`."""
        ...


def build(
    config: MixerConfig | FeedForwardConfig | BuildsItself,
    kit: Kit,
    hidden_size: int,
    prefix: str,
    history: ConvHistory | None,
) -> nn.Module:
    """Build a mixer or a feed-forward.

    Args:
        config: one of `lamella.config`'s, or one with a method `build` of its own.
        kit: supplies projections and state.
        hidden_size: width of the residual stream, in channels.
        prefix: dotted path of the module.
        history: holds the state of the layer's canon convolutions; None if the layer has none.

    Returns:
        The module. A mixer's forward is `(positions, block_input) -> (T, hidden_size)`, a feed-forward's
        `(block_input) -> (T, hidden_size)`.

    Raises:
        ConfigError: no module is known for the config.
    """
    if isinstance(config, BuildsItself):
        return config.build(kit, hidden_size, prefix, history)
    builder = next((_BUILDERS[kind] for kind in type(config).__mro__ if kind in _BUILDERS), None)
    if builder is None:
        raise ConfigError(
            f"{prefix}: {type(config).__name__} has no module: give it a method "
            "build(kit, hidden_size, prefix, history) that returns one"
        )
    return builder(config, kit, hidden_size, prefix, history)


def _without_history(module: Callable[[Any, Kit, int, str], nn.Module]) -> Builder:
    """Return the builder of a module that takes no canon history: it has none, or one of its own."""
    return lambda config, kit, hidden_size, prefix, history: module(config, kit, hidden_size, prefix)


def _build_stochastic(
    config: StochasticConfig, kit: Kit, hidden_size: int, prefix: str, history: ConvHistory | None
) -> Stochastic:
    return Stochastic(config, kit, hidden_size, prefix, history, build)


_BUILDERS: dict[type, Builder] = {
    AttentionConfig: Attention,
    GatedDeltaNetConfig: _without_history(GatedDeltaNet),
    KimiDeltaConfig: _without_history(KimiDelta),
    MambaConfig: _without_history(Mamba),
    StochasticConfig: _build_stochastic,
    MLPConfig: MLP,
    MoEConfig: _without_history(MoE),
}
