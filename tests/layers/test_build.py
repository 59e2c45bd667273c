"""Configs are built into modules by the table, or by the config's own `build`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn

from lamella import config as configs
from lamella.config import AttentionConfig, FeedForwardConfig, MixerConfig, MLPConfig
from lamella.errors import ConfigError
from lamella.layers.attention import Attention
from lamella.layers.build import _BUILDERS, build
from lamella.layers.local_kit import LocalKit

pytestmark = pytest.mark.unit
ATTENTION = dict(num_heads=2, num_kv_heads=1, head_dim=8, scale=1.0)


@dataclass(frozen=True, kw_only=True)
class NarrowAttentionConfig(AttentionConfig):
    """Subclass of an in-tree config."""


@dataclass(frozen=True, kw_only=True)
class OwnConfig(AttentionConfig):
    """Config of another package that derives from an in-tree config and builds another module."""

    def build(self, kit, hidden_size, prefix, history):
        return nn.Linear(hidden_size, self.num_heads)


def test_every_mixer_and_feed_forward_config_has_a_module():
    kinds = {*MixerConfig.__args__, *FeedForwardConfig.__args__}
    assert kinds == set(_BUILDERS)


def test_no_config_of_lamella_builds_itself():
    """Configs must not import layers."""
    assert not [name for name in configs.__all__ if hasattr(getattr(configs, name), "build")]


def test_a_subclass_of_a_config_uses_the_same_module():
    assert isinstance(build(NarrowAttentionConfig(**ATTENTION), LocalKit(), 16, "mixer", None), Attention)


def test_a_configs_own_build_takes_precedence_over_the_table():
    built = build(OwnConfig(**ATTENTION), LocalKit(), 16, "mixer", None)
    assert isinstance(built, nn.Linear) and built.out_features == 2


def test_a_config_without_a_module_is_named():
    with pytest.raises(ConfigError, match=r"layers\.0\.mixer: str has no module: give it a method build\("):
        build("attention", LocalKit(), 16, "layers.0.mixer", None)


def test_a_feed_forward_is_built_with_its_prefix():
    with pytest.raises(ConfigError, match="intermediate_size"):
        build(MLPConfig(intermediate_size=0), LocalKit(), 16, "feed_forward", None)
    assert build(MLPConfig(intermediate_size=8), LocalKit(), 16, "feed_forward", None).down_proj.weight.shape == (16, 8)
