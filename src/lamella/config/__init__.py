"""A model is a tuple of layers: frozen configs of every part, each of which builds its own module.

The configs are the only thing that an architecture file produces and the only thing that the layers read. They say
nothing of devices, engines or checkpoints. All sizes are in elements, all token counts in tokens.
"""

from lamella.config.feed_forward import FeedForwardConfig, MLPConfig, MoEConfig
from lamella.config.mixers import AttentionConfig, MixerConfig, TemperatureConfig
from lamella.config.model import LayerConfig, ModelConfig
from lamella.config.parts import CanonConfig, NormConfig
from lamella.config.rope import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, RopeScaling, YarnScaling

__all__ = [
    "AttentionConfig",
    "CanonConfig",
    "DynamicScaling",
    "FeedForwardConfig",
    "LayerConfig",
    "LinearScaling",
    "Llama3Scaling",
    "MLPConfig",
    "MixerConfig",
    "MoEConfig",
    "ModelConfig",
    "NormConfig",
    "RopeConfig",
    "RopeScaling",
    "TemperatureConfig",
    "YarnScaling",
]
