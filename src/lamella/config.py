"""A model is a tuple of layers: frozen configs of every part, each of which builds its own module.

The configs are the only thing that an architecture file produces and the only thing that the layers read. They say
nothing of devices, engines or checkpoints. All sizes are in elements, all token counts in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamella.errors import ConfigError

if TYPE_CHECKING:
    from lamella.layers.attention import Attention
    from lamella.layers.canon import CanonHistory
    from lamella.layers.feed_forward import MLP
    from lamella.layers.kit import Kit


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check(self.factor > 0, "rope.factor", self.factor, "positive")


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware base change for contexts of `length` tokens, beyond the trained `original_length`.

    The rotation of a cached key cannot change afterwards, so `length` is chosen once, when the model is built (an
    engine takes its `max_model_len`), and not per request as in `transformers`. Up to the trained length it is the
    unscaled rotation.
    """

    factor: float
    original_length: int
    length: int

    def __post_init__(self) -> None:
        _check(self.factor >= 1, "rope.factor", self.factor, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's "NTK by parts": long wavelengths divided by `factor`, short ones kept, a blend between.

    `low_freq_factor == high_freq_factor` (Llama 4 Scout) is a step instead of a blend.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check(self.factor > 0, "rope.factor", self.factor, "positive")
        _check(
            self.low_freq_factor <= self.high_freq_factor,
            "rope.low_freq_factor",
            self.low_freq_factor,
            f"at most high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): a blend by dimension, and cos/sin multiplied by `attention_factor`."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for field in ("factor", "beta_fast", "beta_slow"):
            _check(getattr(self, field) > 0, f"rope.{field}", getattr(self, field), "positive")


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the first `dim` channels of each head.

    `interleaved` rotates the pairs (2i, 2i+1), otherwise the pairs are (i, i + dim/2).
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check(self.dim > 0 and self.dim % 2 == 0, "rope.dim", self.dim, "a positive even number")
        _check(self.theta > 0, "rope.theta", self.theta, "positive")
        yarn = isinstance(self.scaling, YarnScaling)
        _check(not yarn or self.theta > 1, "rope.theta", self.theta, "more than 1 for yarn scaling")
        dynamic = isinstance(self.scaling, DynamicScaling)
        _check(not dynamic or self.dim > 2, "rope.dim", self.dim, "more than 2 for dynamic scaling")


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """RMS normalisation with a learned weight."""

    eps: float

    def __post_init__(self) -> None:
        _check(self.eps >= 0, "norm.eps", self.eps, "not negative")


@dataclass(frozen=True, kw_only=True)
class CanonConfig:
    """Canon layer (arXiv 2512.17351): a causal depthwise convolution of width `kernel`.

    `y = [residual] x + act(bias + conv(x))`, with SiLU as act when `activation`.
    """

    kernel: int = 4
    bias: bool = False
    activation: bool = False
    residual: bool = True

    def __post_init__(self) -> None:
        _check(self.kernel >= 2, "canon.kernel", self.kernel, "at least 2")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal softmax attention with grouped key/value heads.

    Order inside: projections, `qk_norm`, `canon` over [q|k|v], `rope`, attention, output projection. A
    `qk_norm_scope` of "head" normalises each head by itself (Qwen3), "full" all heads of q (or k) in one reduction
    (LlamaCanon). A `window` of w lets a token see itself and the w - 1 tokens before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormConfig | None = None
    qk_norm_scope: str = "head"
    rope: RopeConfig | None = None
    window: int | None = None
    canon: CanonConfig | None = None

    def __post_init__(self) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            _check(getattr(self, field) > 0, f"attention.{field}", getattr(self, field), "positive")
        _check(
            self.num_heads % self.num_kv_heads == 0,
            "attention.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        _check(self.qk_norm_scope in ("head", "full"), "attention.qk_norm_scope", self.qk_norm_scope, "head or full")
        _check(self.window is None or self.window > 0, "attention.window", self.window, "positive")
        if self.rope is not None:
            _check(self.rope.dim <= self.head_dim, "rope.dim", self.rope.dim, f"at most head_dim={self.head_dim}")

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: CanonHistory | None) -> Attention:
        """The module; `history` holds what the layer's canon convolutions remember."""
        from lamella.layers.attention import Attention

        return Attention(self, kit, hidden_size, prefix, history)


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """SwiGLU feed-forward: `down(silu(gate(x)) * up(x))`, with an optional canon over [gate|up]."""

    intermediate_size: int
    gate_up_bias: bool = False
    down_bias: bool = False
    canon: CanonConfig | None = None

    def __post_init__(self) -> None:
        _check(self.intermediate_size > 0, "mlp.intermediate_size", self.intermediate_size, "positive")

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: CanonHistory | None) -> MLP:
        """The module; `history` holds what the layer's canon convolutions remember."""
        from lamella.layers.feed_forward import MLP

        return MLP(self, kit, hidden_size, prefix, history)


# What can stand in a layer. Later kinds of mixer and feed-forward join these unions and bring their own `build`.
MixerConfig = AttentionConfig
FeedForwardConfig = MLPConfig


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One pre-norm decoder layer: `x += mixer(canon(norm(x)))`, then `x += feed_forward(canon(norm(x)))`."""

    mixer: MixerConfig
    feed_forward: FeedForwardConfig
    norm: NormConfig
    mixer_canon: CanonConfig | None = None
    feed_forward_canon: CanonConfig | None = None

    def __post_init__(self) -> None:
        kernels = {canon.kernel for canon in self.canons}
        _check(len(kernels) <= 1, "layer canon kernels", sorted(kernels), "equal, since they share one state")

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        every = (self.mixer_canon, self.mixer.canon, self.feed_forward_canon, self.feed_forward.canon)
        return tuple(canon for canon in every if canon is not None)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole decoder: embedding, layers, final norm, head.

    `max_position_embeddings` is the longest context that the checkpoint claims to support, in tokens.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "max_position_embeddings"):
            _check(getattr(self, field) > 0, field, getattr(self, field), "positive")
        _check(len(self.layers) > 0, "layers", self.layers, "at least one layer")


def _check(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{field}={value!r}: must be {allowed}")
