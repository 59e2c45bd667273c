"""The attention mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamella.config import AttentionConfig
from lamella.layers.canon import Canon, CanonHistory
from lamella.layers.context import require_batch
from lamella.layers.kit import Kit
from lamella.layers.norm import RMSNorm
from lamella.layers.rotary import Rotary
from lamella.state.spec import PagedState


class Attention(nn.Module):
    """Projections, query/key norm, canon over [q|k|v], rotation, attention, output projection, in this order."""

    def __init__(
        self, config: AttentionConfig, kit: Kit, hidden_size: int, prefix: str, history: CanonHistory | None
    ) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = (config.query_size, config.kv_size, config.kv_size)
        self.qkv_proj = kit.qkv_linear(hidden_size, heads, kv_heads, dim, config.qkv_bias, f"{prefix}.qkv_proj")
        self.o_proj = kit.row_linear(config.query_size, hidden_size, config.output_bias, f"{prefix}.o_proj")
        if config.qk_norm:
            widths = (dim, dim) if config.qk_norm_scope == "head" else self.sizes[:2]
            self.q_norm, self.k_norm = (RMSNorm(width, config.qk_norm.eps, kit.device) for width in widths)
        if config.canon:
            assert history is not None
            self.canon = Canon(config.canon, config.canon_channels, kit, history)
        self.rotary = Rotary(config.rope, kit.device) if config.rope else None
        spec = PagedState(kv_heads, dim, kit.dtype, config.window)
        self.attention = kit.attention(heads, config.scale, spec, f"{prefix}.attention")

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """hidden (T, hidden_size) -> (T, hidden_size)."""
        q, k, v = self.qkv_proj(hidden).split(self.sizes, dim=-1)
        if self.config.qk_norm:
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        if self.config.canon:
            q, k, v = self.canon(torch.cat((q, k, v), dim=-1)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in (q, k, v))
        if self.rotary is not None:
            q, k = self.rotary(require_batch(), positions, q, k)
        return self.o_proj(self.attention(q, k, v).flatten(1))

    def _norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x (T, heads * D) normalised as a whole or head by head."""
        if self.config.qk_norm_scope == "full":
            return norm(x)
        return norm(x.unflatten(-1, (-1, self.config.head_dim))).flatten(-2)
