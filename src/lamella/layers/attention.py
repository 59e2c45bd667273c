"""The attention mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamella.config import AttentionConfig
from lamella.layers.canon import build_canon
from lamella.layers.kit import Kit
from lamella.layers.norm import HeadNorm, RMSNorm
from lamella.layers.rotary import Positions, Rotary, Temperature
from lamella.layers.short_conv import ConvHistory
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.rotary import rotate
from lamella.parallel.sharding import Split
from lamella.state.spec import PagedState


class Attention(nn.Module):
    """Causal self-attention over the query heads of this rank.

    Attributes:
        heads: number of query heads on this rank.
        kv_heads: number of key/value heads on this rank.
        sizes: widths of the sections [q | k | v] of the projection.
        q_norm: weighted norm of the queries, per head or over all heads; None if the config has none.
        k_norm: weighted norm of the keys, per head or over all heads; None if the config has none.
        canon: convolution of [q | k | v] over time, or None.
        rotary: rotation of queries and keys, or None.
        head_norm: norm without a weight, applied to each head after the rotation, or None.
        temperature: position-dependent factors of the queries, or None.
        attention: attention over the kit's paged state.
    """

    def __init__(
        self, config: AttentionConfig, kit: Kit, hidden_size: int, prefix: str, history: ConvHistory | None
    ) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads = kit.partition.heads(config.num_heads), kit.partition.kv_heads(config.num_kv_heads)
        dim = config.head_dim
        queries, keys = heads.times(dim), kv_heads.times(dim)
        self.heads, self.kv_heads = heads.size, kv_heads.size
        self.sizes = (queries.size, keys.size, keys.size)
        self.qkv_proj = kit.qkv_linear(
            hidden_size, config.num_heads, config.num_kv_heads, dim, config.qkv_bias, f"{prefix}.qkv_proj"
        )
        self.o_proj = kit.row_linear(config.query_size, hidden_size, config.output_bias, f"{prefix}.o_proj")
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.head_norm: HeadNorm | None = None
        if config.qk_norm and not config.qk_norm_weight:
            self.head_norm = HeadNorm(dim, config.qk_norm.eps, kit.device)
        elif config.qk_norm and config.qk_norm_scope == "full":
            self.q_norm, self.k_norm = (kit.column_norm(split, config.qk_norm.eps) for split in (queries, keys))
        elif config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(dim, config.qk_norm.eps, kit.device) for _ in "qk")
        self.canon = build_canon(config.canon, Split.join((queries, keys, keys)), kit, history, "mixer")
        self.rotary = Rotary(config.rope, kit.device, config.chunk) if config.rope else None
        self.temperature = Temperature(config.temperature) if config.temperature else None
        spec = PagedState(kv_heads.size, dim, kit.dtype, config.window, config.chunk)
        self.attention = kit.attention(heads.size, config.scale, spec, f"{prefix}.attention")

    def forward(self, positions: Positions, entry: SublayerInput) -> Tensor:
        """Return the output of the mixer (T, hidden_size) for an input (T, hidden_size)."""
        q, k, v = entry.project(self.qkv_proj).split(self.sizes, dim=-1)
        q, k = self.normalize(q, k)
        if self.canon is not None:
            q, k, v = self.canon(torch.cat((q, k, v), dim=-1)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in (q, k, v))
        if self.rotary is not None:
            q, k = rotate(q, k, positions.rope(self.rotary))
        if self.head_norm is not None:
            q, k = self.head_norm(q), self.head_norm(k)
        if self.temperature is not None:
            q = (q.float() * positions.temperature(self.temperature)[:, None, None]).to(q.dtype)
        return self.o_proj(self.attention(q, k, v).flatten(1))

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return q (T, H * D) and k (T, KV * D) after the weighted norms; unchanged if the config has none."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        if self.config.qk_norm_scope == "full":
            return self.q_norm(q), self.k_norm(k)
        dim = self.config.head_dim
        q, k = (part.unflatten(-1, (-1, dim)) for part in (q, k))
        return self.q_norm(q).flatten(-2), self.k_norm(k).flatten(-2)
