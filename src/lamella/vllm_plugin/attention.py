"""Attention over paged state by vLLM's attention layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

from lamella.errors import ConfigError
from lamella.state.spec import PagedState

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class VllmAttention(nn.Module):
    """vLLM's attention with the shapes of the kit; chunked only if a request can be longer than a chunk."""

    def __init__(self, heads: int, scale: float, spec: PagedState, config: VllmConfig, prefix: str) -> None:
        """Create vLLM's layer.

        Args:
            heads: query heads of this rank.
            scale: factor of the scores.
            spec: paged state of the layer.
            config: vLLM's config.
            prefix: dotted path of the layer.

        Raises:
            ConfigError: the block size does not divide the chunk size.
        """
        super().__init__()
        self.heads, self.head_dim = heads, spec.head_dim
        common: dict[str, Any] = {
            "num_kv_heads": spec.kv_heads,
            "cache_config": config.cache_config,
            "quant_config": config.quant_config,
            "prefix": f"{prefix}.attn",
        }
        if spec.chunk is None or spec.chunk >= config.model_config.max_model_len:
            window = spec.window
            self.attn = Attention(heads, spec.head_dim, scale, per_layer_sliding_window=window, **common)
        else:
            block_size = config.cache_config.block_size
            if block_size and spec.chunk % block_size:
                raise ConfigError(
                    f"{prefix}: a chunk of {spec.chunk} tokens ends within a block of {block_size}, which vLLM cannot "
                    "compute; give a block_size that divides it"
                )
            self.attn = ChunkedLocalAttention(heads, spec.head_dim, scale, spec.chunk, **common)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention (T, H, D) of q (T, H, D) over the cache and the new k and v (T, KV, D)."""
        return self.attn(q.flatten(1), k.flatten(1), v.flatten(1)).view(-1, self.heads, self.head_dim)
