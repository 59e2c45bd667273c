"""Model descriptions: frozen configs of all parts of a model, and the strict reader of `config.json` files.

A model is a tuple of layer configs. Configs are the only output of an architecture's reader, and the only input of
layers. They do not depend on devices, engines or checkpoints. `lamella.layers.build` builds modules from them. Sizes
are in elements, lengths in tokens.
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
