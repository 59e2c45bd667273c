"""Configs of a decoder layer and of a model, which is a tuple of layers."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.config.checks import check
from lamella.config.feed_forward import FeedForwardConfig
from lamella.config.mixers import MixerConfig
from lamella.config.parts import CanonConfig, NormConfig


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One pre-norm decoder layer: `x += mixer(canon(norm(x)))`, then `x += feed_forward(canon(norm(x)))`.

    Attributes:
        mixer: token mixer.
        feed_forward: channel mixer.
        norm: norm before the mixer and before the feed-forward.
        mixer_canon: convolution before the mixer ("canon A"); None: no convolution.
        feed_forward_canon: convolution before the feed-forward ("canon C"); None: no convolution.
    """

    mixer: MixerConfig
    feed_forward: FeedForwardConfig
    norm: NormConfig
    mixer_canon: CanonConfig | None = None
    feed_forward_canon: CanonConfig | None = None

    def __post_init__(self) -> None:
        kernels = {canon.kernel for canon in self.canons}
        check(len(kernels) <= 1, "layer canon kernels", sorted(kernels), "equal, since they share one state")

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        """All canon convolutions of the layer, including those inside mixer and feed-forward."""
        around = (self.mixer_canon, self.feed_forward_canon)
        inside = (canon for part in (self.mixer, self.feed_forward) for canon in getattr(part, "canons", ()))
        return (*(canon for canon in around if canon is not None), *inside)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Whole decoder: embedding, layers, final norm and head.

    Attributes:
        architecture: name of the architecture.
        vocab_size: number of tokens.
        hidden_size: channels of the residual stream.
        layers: in order.
        norm: norm after the last layer.
        tie_word_embeddings: True if the head uses the embedding's weight.
        max_position_embeddings: longest context that the checkpoint supports, in tokens. If `length_is_known` is False,
            the checkpoint states no limit, and this is the default length.
        length_is_known: see `max_position_embeddings`.
        bos_token_id: token that starts a text.
        eos_token_ids: tokens that end a text.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    length_is_known: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "max_position_embeddings"):
            check(getattr(self, field) > 0, field, getattr(self, field), "positive")
        check(len(self.layers) > 0, "layers", self.layers, "at least one layer")
