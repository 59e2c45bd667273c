"""Configs of token mixers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamella.config.checks import check
from lamella.config.parts import CanonConfig, NormConfig
from lamella.config.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Attention temperature (Llama 4): queries are scaled by `1 + scale * log(1 + floor((p + 1) / floor_scale))`.

    `p` is the position. The factor is 1 for the first `floor_scale - 1` positions.

    Attributes:
        scale: strength; 0 disables it.
        floor_scale: positions per step of the factor.
    """

    scale: float = 0.1
    floor_scale: int = 8192

    def __post_init__(self) -> None:
        check(self.scale >= 0, "temperature.scale", self.scale, "not negative")
        check(self.floor_scale > 0, "temperature.floor_scale", self.floor_scale, "positive")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal softmax attention with grouped key/value heads.

    Order of operations: projections, `qk_norm`, `canon` over [q|k|v], `rope`, `temperature`, attention, output
    projection.

    Attributes:
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads; divides `num_heads`.
        head_dim: channels per head.
        scale: factor of the attention scores.
        qkv_bias: True if all three projections have a bias, or the names of those that have one ("q_proj", ...).
        output_bias: True if the output projection has a bias.
        qk_norm: norm of queries and keys; None: no norm.
        qk_norm_scope: "head" normalizes each head by itself (Qwen3), "full" all heads of q (or k) in one reduction
            (LlamaCanon).
        qk_norm_weight: False (Llama 4): the norm of each head has no weight and comes after the rotation.
        rope: rotary position embedding; None: no position embedding.
        temperature: scaling of queries by position; None: no scaling.
        window: sliding window: a token sees itself and the `window - 1` tokens before it.
        chunk: chunk size: a token sees the tokens of its own chunk up to itself. Chunks are the positions [0, chunk),
            [chunk, 2 chunk), ... RoPE depends only on differences of positions, and no token sees another chunk. So
            tokens are rotated by their position in the chunk, whose angles are exact for contexts of any length.
        canon: convolution over [q|k|v] ("canon B"); None: no convolution.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool | tuple[str, ...] = False
    output_bias: bool = False
    qk_norm: NormConfig | None = None
    qk_norm_scope: str = "head"
    qk_norm_weight: bool = True
    rope: RopeConfig | None = None
    temperature: TemperatureConfig | None = None
    window: int | None = None
    chunk: int | None = None
    canon: CanonConfig | None = None

    def __post_init__(self) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            check(getattr(self, field) > 0, f"attention.{field}", getattr(self, field), "positive")
        check(
            self.num_heads % self.num_kv_heads == 0,
            "attention.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        check(self.qk_norm_scope in ("head", "full"), "attention.qk_norm_scope", self.qk_norm_scope, "head or full")
        plain = self.qk_norm is None or (self.qk_norm_scope == "head" and self.canon is None)
        check(self.qk_norm_weight or plain, "attention.qk_norm_weight", False, "with scope head and without a canon")
        check(self.window is None or self.window > 0, "attention.window", self.window, "positive")
        check(self.chunk is None or self.chunk > 0, "attention.chunk", self.chunk, "positive")
        check(self.chunk is None or self.window is None, "attention.chunk", self.chunk, "without a window")
        if self.rope is not None:
            check(self.rope.dim <= self.head_dim, "rope.dim", self.rope.dim, f"at most head_dim={self.head_dim}")

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        """Canon convolutions inside the mixer."""
        return () if self.canon is None else (self.canon,)

    @property
    def query_size(self) -> int:
        """Number of channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Number of channels of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Gated delta net (arXiv 2412.06464): a state matrix per value head, with one decay per head and a delta rule.

    Value head h uses key head h // (value_heads / key_heads). Queries, keys and values pass a convolution with SiLU.
    The output is normalized per head, then multiplied by SiLU of a gate.

    Attributes:
        value_heads: number of value heads.
        key_heads: number of query and key heads; divides `value_heads`.
        key_head_dim: channels per query and key head.
        value_head_dim: channels per value head.
        kernel: width of the convolution in tokens.
        norm: norm of the output heads.
    """

    value_heads: int
    key_heads: int
    key_head_dim: int
    value_head_dim: int
    kernel: int
    norm: NormConfig

    def __post_init__(self) -> None:
        _check_positive(self, "gdn", "value_heads", "key_heads", "key_head_dim", "value_head_dim")
        check(self.kernel >= 2, "gdn.kernel", self.kernel, "at least 2")
        check(
            self.value_heads % self.key_heads == 0,
            "gdn.key_heads",
            self.key_heads,
            f"a divisor of value_heads={self.value_heads}",
        )

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        """Canon convolutions inside the mixer."""
        return ()

    @property
    def key_size(self) -> int:
        """Number of channels of all key heads."""
        return self.key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Number of channels of all value heads."""
        return self.value_heads * self.value_head_dim


@dataclass(frozen=True, kw_only=True)
class KimiDeltaConfig:
    """Kimi delta attention (arXiv 2510.26692): gated delta net with one decay per key channel.

    Decays and output gate come from low-rank projections. Queries, keys and values each have their own convolution.

    Attributes:
        num_heads: number of query, key and value heads.
        head_dim: channels per head.
        kernel: width of the convolutions in tokens.
        norm: norm of the output heads.
        gate: activation of the output gate, "silu" or "sigmoid".
    """

    num_heads: int
    head_dim: int
    kernel: int
    norm: NormConfig
    gate: Literal["silu", "sigmoid"] = "silu"

    def __post_init__(self) -> None:
        _check_positive(self, "kda", "num_heads", "head_dim")
        check(self.kernel >= 2, "kda.kernel", self.kernel, "at least 2")
        check(self.gate in ("silu", "sigmoid"), "kda.gate", self.gate, "silu or sigmoid")

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        """Canon convolutions inside the mixer."""
        return ()

    @property
    def size(self) -> int:
        """Number of channels of all heads."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba selective scan with grouped heads, distilled from attention ("Mamba in the Llama", arXiv 2408.15237).

    The bias of the step size is added twice, as in the training code.

    Attributes:
        state_size: channels per head, and state values per channel.
        inner_size: output channels.
        kv_size: channels of x and B, whose heads are repeated up to `inner_size` channels like keys and values.
        dt_rank: rank of the step size projection.
        kernel: width of the convolution in tokens.
        repeat_before_conv: True if heads of x are repeated before the convolution, False if after it.
        conv_bias: True if the convolution has a bias.
        dt_bias: True if the step size has a bias.
        linear_bias: True if the linear projections have a bias.
    """

    state_size: int
    inner_size: int
    kv_size: int
    dt_rank: int
    kernel: int
    repeat_before_conv: bool = True
    conv_bias: bool = True
    dt_bias: bool = True
    linear_bias: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "mamba", "state_size", "inner_size", "kv_size", "dt_rank")
        check(self.kernel >= 2, "mamba.kernel", self.kernel, "at least 2")
        for field in ("inner_size", "kv_size"):
            size = getattr(self, field)
            check(size % self.state_size == 0, f"mamba.{field}", size, f"a multiple of state_size={self.state_size}")
        check(
            self.inner_size % self.kv_size == 0,
            "mamba.kv_size",
            self.kv_size,
            f"a divisor of d_inner={self.inner_size}",
        )

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        """Canon convolutions inside the mixer."""
        return ()

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.inner_size // self.state_size

    @property
    def kv_heads(self) -> int:
        """Number of heads of x and B."""
        return self.kv_size // self.state_size


@dataclass(frozen=True, kw_only=True)
class StochasticConfig:
    """Layer of a supernet: several mixers, one of which is active, see `lamella.config.placement`.

    Attributes:
        mixers: (name, config) of each mixer.
        main: name of the mixer that is active without a placement.
    """

    mixers: tuple[tuple[str, SingleMixerConfig], ...]
    main: str

    def __post_init__(self) -> None:
        names = self.names
        check(len(names) > 0 and len(set(names)) == len(names), "stochastic.mixers", names, "distinct names")
        check(self.main in names, "stochastic.main_mixer_name", self.main, f"one of {', '.join(names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the mixers, in order."""
        return tuple(name for name, _ in self.mixers)

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        """Canon convolutions inside the mixer."""
        return tuple(canon for _, mixer in self.mixers for canon in mixer.canons)


def _check_positive(config: object, name: str, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        check(value > 0, f"{name}.{field}", value, "positive")


# Mixers of this package. Other packages can define their own mixer configs, see `lamella.layers.build`.
SingleMixerConfig = AttentionConfig | GatedDeltaNetConfig | KimiDeltaConfig | MambaConfig
MixerConfig = SingleMixerConfig | StochasticConfig
