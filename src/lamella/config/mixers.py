"""The token-mixing parts of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamella.config.checks import check
from lamella.config.parts import CanonConfig, NormConfig
from lamella.config.rope import RopeConfig

if TYPE_CHECKING:
    from lamella.layers.attention import Attention
    from lamella.layers.canon import CanonHistory
    from lamella.layers.kit import Kit


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
    qkv_bias: bool = False
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
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: CanonHistory | None) -> Attention:
        """The module; `history` holds what the layer's canon convolutions remember."""
        from lamella.layers.attention import Attention

        return Attention(self, kit, hidden_size, prefix, history)


# What can stand as a layer's mixer. Later kinds join this union and bring their own `build`.
MixerConfig = AttentionConfig
