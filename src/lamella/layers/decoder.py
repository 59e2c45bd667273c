"""Decoder layer, decoder stack, and the language model around the stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lamella.config import LayerConfig, ModelConfig
from lamella.layers.build import build
from lamella.layers.canon import build_canon
from lamella.layers.context import ForwardBatch, GivenEmbeddings, current_batch, forward_batch
from lamella.layers.kit import Kit
from lamella.layers.norm import RMSNorm, build_norm
from lamella.layers.rotary import Positions
from lamella.layers.short_conv import ConvHistory
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.ragged import RaggedBatch
from lamella.parallel.sharding import Split


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer: an attention part, then a feed-forward part.

    Activations travel as two tensors; the residual stream is `hidden + residual`. The sum is computed together with the
    next norm, in one kernel.
    """

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
        """Return `hidden` and `residual`, (T, hidden_size) each, after the layer."""
        hidden, residual = self.apply_mixer(self.mixer, positions, hidden, residual)
        return self.apply_feed_forward(hidden, residual)

    def apply_mixer(
        self, mixer: nn.Module, positions: Positions, hidden: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return hidden and residual after the attention part, computed by `mixer`."""
        entry = SublayerInput(hidden, residual, self.mixer_norm, self.mixer_canon)
        return mixer(positions, entry), entry.residual

    def apply_feed_forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden and residual after the feed-forward part."""
        entry = SublayerInput(hidden, residual, self.feed_forward_norm, self.feed_forward_canon)
        return self.feed_forward(entry), entry.residual


# Computes one layer: (layer, positions, hidden, residual) -> (hidden, residual).
LayerCall: TypeAlias = Callable[[Any, Positions, Tensor, Tensor], tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """Token embedding, decoder layers and final norm."""

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
        """Return the hidden states after the final norm.

        Args:
            input_ids: (T,) int64.
            positions: (T,) int64.
            given: embeddings that replace those of some tokens.
            call: computes one layer; another function than the layer's forward computes it in compiled form.

        Returns:
            (T, hidden_size).
        """
        residual = self.embed_tokens(input_ids)
        if given is not None:
            residual = residual.index_copy(0, given.tokens, given.rows)
        hidden = torch.zeros_like(residual)
        shared_positions = Positions(positions)
        for layer in self.layers:
            hidden, residual = call(layer, shared_positions, hidden, residual)
        return self.norm(hidden, residual)[0]


def plain_batch(input_ids: Tensor) -> ForwardBatch:
    """Return the batch of a forward without an engine.

    Args:
        input_ids: (B, S), one request per row; or (T,), one request.
    """
    rows, length = input_ids.shape if input_ids.dim() == 2 else (1, input_ids.shape[0])
    return ForwardBatch(RaggedBatch.from_lengths([length] * rows, [length] * rows, input_ids.device))


class LanguageModel(nn.Module):
    """Decoder and language model head, built from any `ModelConfig`.

    Inside `forward_batch` the model continues the requests of an engine. Outside it, every call is a plain forward
    without stored state.
    """

    def __init__(self, config: ModelConfig, kit: Kit) -> None:
        super().__init__()
        self.config, self.group = config, kit.group
        self.model = Decoder(config, kit)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = kit.lm_head(config.vocab_size, config.hidden_size, tied, "lm_head")

    @property
    def is_heterogeneous(self) -> bool:
        """True if any two layers have different configs."""
        return len(set(self.config.layers)) > 1

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            input_ids: (T,) int64 inside an engine's batch. Without an engine (batch, seq) or (tokens,); every row is a
                request that starts at position 0.
            positions: same shape as `input_ids`; used for the rotary embedding only. By default the positions of the
                tokens in their requests.

        Returns:
            (*input_ids.shape, hidden_size).

        Raises:
            ValueError: `input_ids` is empty, or has another number of dimensions.
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
        """Return logits (..., vocab_size) in fp32 for hidden states (..., hidden_size)."""
        return self.lm_head(hidden)
