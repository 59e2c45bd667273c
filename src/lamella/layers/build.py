"""Build mixers and feed-forwards from their configs.

In-tree configs hold data only; the table in this file maps each to its module class. A config of another package has no
entry in the table. It builds its own module in a method `build(kit, hidden_size, prefix, history)`.
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
    """Config of another package that builds its own module."""

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: ConvHistory | None) -> nn.Module:
        """Return the module; see `lamella.layers.build.build` for the arguments."""
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
        config: a config class of `lamella.config`, or any object with a method `build`.
        kit: supplies projections and state.
        hidden_size: width of the residual stream, in channels.
        prefix: dotted path of the module.
        history: state of the layer's canon convolutions; None if the layer has none.

    Returns:
        The module. The forward of a mixer is `(positions, sublayer_input) -> (T, hidden_size)`, and the forward of a
        feed-forward is `(sublayer_input) -> (T, hidden_size)`.

    Raises:
        ConfigError: the config is not in the table and has no method `build`.
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
    """Return a builder that drops the canon history, for modules that do not use the layer's history."""
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
