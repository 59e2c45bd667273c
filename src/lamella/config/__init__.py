"""A model is a tuple of layers: frozen configs of every part, and the strict reader of `config.json` files.

The configs are the only thing that an architecture's reader returns and the only thing that the layers read. They say
nothing of devices, engines or checkpoints; `lamella.layers.build` makes modules of them. All sizes are in elements, all
token counts in tokens.
"""

from lamella.config.feed_forward import FeedForwardConfig, MLPConfig, MoEConfig
from lamella.config.mixers import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    MambaConfig,
    MixerConfig,
    SingleMixerConfig,
    StochasticConfig,
    TemperatureConfig,
)
from lamella.config.model import LayerConfig, ModelConfig
from lamella.config.parts import CanonConfig, NormConfig
from lamella.config.placement import (
    Placement,
    PlacementLike,
    describe_placement,
    main_placement,
    mixer_names,
    placed,
    read_placement,
)
from lamella.config.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

__all__ = [
    "AttentionConfig",
    "CanonConfig",
    "DynamicScaling",
    "FeedForwardConfig",
    "GatedDeltaNetConfig",
    "KimiDeltaConfig",
    "LayerConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MLPConfig",
    "MambaConfig",
    "MixerConfig",
    "MoEConfig",
    "ModelConfig",
    "NormConfig",
    "Placement",
    "PlacementLike",
    "RopeConfig",
    "RopeScaling",
    "SingleMixerConfig",
    "StochasticConfig",
    "TemperatureConfig",
    "YarnScaling",
    "describe_placement",
    "main_placement",
    "mixer_names",
    "placed",
    "read_placement",
]
