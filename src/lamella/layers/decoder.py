"""The decoder: layers, the stack, and the language model around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lamella.config import LayerConfig, ModelConfig
from lamella.layers.block_input import BlockInput
from lamella.layers.build import build
from lamella.layers.canon import build_canon
from lamella.layers.context import ForwardBatch, GivenEmbeddings, current_batch, forward_batch
from lamella.layers.kit import Kit
from lamella.layers.norm import RMSNorm, build_norm
from lamella.layers.rotary import Positions
from lamella.layers.short_conv import ConvHistory
from lamella.ops.ragged import RaggedBatch
from lamella.parallel.sharding import Split


class DecoderLayer(nn.Module):
    """Pre-norm block in the residual-pair form: the sum of `hidden` and `residual` is the stream."""

    def __init__(self, config: LayerConfig, kit: Kit, hidden_size: int, prefix: str) -> None:
        super().__init__()
        self.history = ConvHistory(config.canons[0].kernel) if config.canons else None
        channels = Split.whole(hidden_size)
        self.mixer_norm = build_norm(config.norm, hidden_size, kit.device)
        self.mixer_canon = build_canon(config.mixer_canon, channels, kit, self.history, "mixer_canon")
        self.mixer = build(config.mixer, kit, hidden_size, f"{prefix}.mixer", self.history)
        self.feed_forward_norm = build_norm(config.norm, hidden_size, kit.device)
        self.feed_forward_canon = build_canon(
            config.feed_forward_canon, channels, kit, self.history, "feed_forward_canon"
        )
        self.feed_forward = build(config.feed_forward, kit, hidden_size, f"{prefix}.feed_forward", self.history)
        if self.history is not None:
            self.history.declare(kit, f"{prefix}.history")

    def forward(self, positions: Positions, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """hidden and residual (T, hidden_size) -> the same pair after the layer."""
        hidden, residual = self.mix(self.mixer, positions, hidden, residual)
        return self.feed(hidden, residual)

    def mix(self, mixer: nn.Module, positions: Positions, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden and residual after the attention part, computed by `mixer`."""
        entry = BlockInput(hidden, residual, self.mixer_norm, self.mixer_canon)
        return mixer(positions, entry), entry.residual

    def feed(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden and residual after the feed-forward part."""
        entry = BlockInput(hidden, residual, self.feed_forward_norm, self.feed_forward_canon)
        return self.feed_forward(entry), entry.residual


# Who computes a layer: what is called with it, and as it is.
LayerCall: TypeAlias = Callable[[Any, Positions, Tensor, Tensor], tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, kit: Kit) -> None:
        super().__init__()
        self.embed_tokens = kit.embedding(config.vocab_size, config.hidden_size, "model.embed_tokens")
        self.layers = nn.ModuleList(
            DecoderLayer(layer, kit, config.hidden_size, f"model.layers.{index}")
            for index, layer in enumerate(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm.eps, kit.device)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        given: GivenEmbeddings | None = None,
        call: LayerCall = DecoderLayer.__call__,
    ) -> Tensor:
        """ids and positions (T,) -> (T, hidden_size), each layer by way of `call`.

        The rows of `given` replace the embeddings of its tokens.
        """
        residual = self.embed_tokens(input_ids)
        if given is not None:
            residual = residual.index_copy(0, given.tokens, given.rows)
        hidden = torch.zeros_like(residual)
        at = Positions(positions)
        for layer in self.layers:
            hidden, residual = call(layer, at, hidden, residual)
        return self.norm(hidden, residual)[0]


def plain_batch(input_ids: Tensor) -> ForwardBatch:
    """The batch of a forward without an engine: every row of ids (B, S), or the one of ids (T,), from nothing."""
    rows, length = input_ids.shape if input_ids.dim() == 2 else (1, input_ids.shape[0])
    return ForwardBatch(RaggedBatch.from_lengths([length] * rows, [length] * rows, input_ids.device))


class LanguageModel(nn.Module):
    """Decoder and head of any `ModelConfig`. Inside an engine's batch it continues requests; alone it starts afresh."""

    def __init__(self, config: ModelConfig, kit: Kit) -> None:
        super().__init__()
        self.config, self.group = config, kit.group
        self.model = Decoder(config, kit)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = kit.lm_head(config.vocab_size, config.hidden_size, tied, "lm_head")

    @property
    def is_heterogeneous(self) -> bool:
        """Whether any two layers differ."""
        return len(set(self.config.layers)) > 1

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.

        Without an engine: ids (batch, seq) or (tokens,), each row a request of its own from position 0; returns
        (batch, seq, hidden) or (tokens, hidden). `positions`, of the shape of the ids, change only the rotation.
        """
        batch = current_batch()
        if batch is not None:
            return self.model(input_ids, batch.ragged.positions if positions is None else positions, batch.given)
        if input_ids.dim() not in (1, 2) or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)}: must be (batch, seq) or (tokens,), not empty"
            )
        batch = plain_batch(input_ids)
        with forward_batch(batch):
            flat = batch.ragged.positions if positions is None else positions.flatten()
            return self.model(input_ids.flatten(), flat).view(*input_ids.shape, -1)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab) in fp32 for every row of hidden (..., hidden_size)."""
        return self.lm_head(hidden)
