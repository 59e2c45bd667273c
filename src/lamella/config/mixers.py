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
            check(getattr(self, field) > 0, f"attention.{field}", getattr(self, field), "positive")
        check(
            self.num_heads % self.num_kv_heads == 0,
            "attention.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        check(self.qk_norm_scope in ("head", "full"), "attention.qk_norm_scope", self.qk_norm_scope, "head or full")
        check(self.window is None or self.window > 0, "attention.window", self.window, "positive")
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
