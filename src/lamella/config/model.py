"""A decoder layer, and the model that is a tuple of them."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.config.checks import check
from lamella.config.feed_forward import FeedForwardConfig
from lamella.config.mixers import MixerConfig
from lamella.config.parts import CanonConfig, NormConfig


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
        check(len(kernels) <= 1, "layer canon kernels", sorted(kernels), "equal, since they share one state")

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        """Canon convolutions of the layer, those inside its parts included."""
        around = (self.mixer_canon, self.feed_forward_canon)
        inside = (canon for part in (self.mixer, self.feed_forward) for canon in getattr(part, "canons", ()))
        return (*(canon for canon in around if canon is not None), *inside)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole decoder: embedding, layers, final norm, head.

    `max_position_embeddings` is the longest context that the checkpoint claims to support, in tokens; where
    `length_is_known` is false it claims nothing, and this is what to take where nobody says more.
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
