"""The token-mixing parts of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamella.config.checks import check
from lamella.config.parts import CanonConfig, NormConfig
from lamella.config.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Queries that grow with their position p (Llama 4): times `1 + scale * log(1 + floor((p + 1) / floor_scale))`.

    The first `floor_scale - 1` positions are left as they are.
    """

    scale: float = 0.1
    floor_scale: int = 8192

    def __post_init__(self) -> None:
        check(self.scale >= 0, "temperature.scale", self.scale, "not negative")
        check(self.floor_scale > 0, "temperature.floor_scale", self.floor_scale, "positive")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal softmax attention with grouped key/value heads.

    Order inside: projections, `qk_norm`, `canon` over [q|k|v], `rope`, `temperature`, attention, output projection. A
    `qk_norm_scope` of "head" normalises each head by itself (Qwen3), "full" all heads of q (or k) in one reduction
    (LlamaCanon). Without `qk_norm_weight` (Llama 4) the norm of each head has no weight and stands behind the rotation,
    which leaves it as it is but for rounding.

    A `window` of w lets a token see itself and the w - 1 tokens before it. A `chunk` of c lets it see what stands in
    its own chunk up to itself, chunks being the positions [0, c), [c, 2c) and so on. Nothing is ever compared across
    chunks, and a rotation shows only in differences of positions: so tokens turn by their positions in their chunks,
    whose angles stay exact however long the context.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool | tuple[str, ...] = False  # of all three projections, or of those named ("q_proj", ...)
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
        """Canon convolutions inside the part."""
        return () if self.canon is None else (self.canon,)

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of all key heads; values have as many."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Gated delta net (arXiv 2412.06464): a matrix for each value head, decayed as a whole, corrected by a delta rule.

    Value head h has key head h // (value_heads / key_heads). A convolution of width `kernel` with SiLU stands before
    queries, keys and values; the output is normed a head at a time, then multiplied by SiLU of a gate.
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
        """Canon convolutions inside the part."""
        return ()

    @property
    def key_size(self) -> int:
        """Channels of all key heads."""
        return self.key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Channels of all value heads."""
        return self.value_heads * self.value_head_dim


@dataclass(frozen=True, kw_only=True)
class KimiDeltaConfig:
    """Kimi delta attention (arXiv 2510.26692): the same with a decay for each key channel, from a low-rank projection.

    Queries, keys and values have `num_heads` heads of `head_dim`, each kind a convolution of its own; the output's gate
    is low-rank too, with the activation `gate`, "silu" or "sigmoid".
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
        """Canon convolutions inside the part."""
        return ()

    @property
    def size(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Selective scan with grouped inputs, for attention to be distilled into ("Mamba in the Llama", arXiv 2408.15237).

    Heads of `state_size` channels, each channel with `state_size` numbers of state. `inner_size` channels come out;
    what is scanned and what is written (x and B) have `kv_size` channels, whose heads are repeated like keys and
    values: x before its convolution, or behind it unless `repeat_before_conv`. The bias of the step size counts twice,
    as in the training code.
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
        """Canon convolutions inside the part."""
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
    """Several mixers of which one is active: a layer of a supernet. `mixers` are (name, config) pairs.

    Which one it is, is a *placement*'s to say, see `lamella.config.placement`; `main` where none says anything.
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
        """Canon convolutions inside the part."""
        return tuple(canon for _, mixer in self.mixers for canon in mixer.canons)


def _check_positive(config: object, name: str, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        check(value > 0, f"{name}.{field}", value, "positive")


# What can stand as a layer's mixer. Other packages' configs stand beside these unions, see `lamella.layers.build`.
SingleMixerConfig = AttentionConfig | GatedDeltaNetConfig | KimiDeltaConfig | MambaConfig
MixerConfig = SingleMixerConfig | StochasticConfig
