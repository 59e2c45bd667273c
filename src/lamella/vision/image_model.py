"""`ImageModel`: the interface between the engine and a vision encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from lamella.checkpoint.files import Checkpoint


class ImageModel(Protocol):
    """Vision encoder of an architecture, with its image preprocessing.

    Attributes:
        placeholder: id of the token that marks an image in a prompt.
        placeholder_text: text of that token.
        patch: id of the token at whose positions image embeddings replace token embeddings.
        largest_shape: shape of the tiles tensor of the largest image.
    """

    placeholder: int
    placeholder_text: str
    patch: int
    largest_shape: tuple[int, ...]

    @staticmethod
    def has_encoder(checkpoint: Checkpoint, load_format: str) -> bool:
        """Return True if the checkpoint has a vision encoder; log a line if it has none. No tensor is read.

        Raises:
            ConfigError: the config lacks the encoder that the tensors have.
            CheckpointError: the files cannot be read.
        """
        ...

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str,
        token_id: Callable[[str], int | None],
        load_format: str,
        seed: int,
    ) -> Self:
        """Load the vision encoder of a checkpoint.

        Args:
            checkpoint: opened checkpoint.
            dtype: dtype of weights and activations.
            device: device of the weights.
            token_id: returns the tokenizer's id for the text of a token, or None.
            load_format: "auto", or "dummy" for random weights.
            seed: seed of random weights.

        Raises:
            ConfigError: a value is missing in the config, or a token in the tokenizer.
            CheckpointError: the tensors do not fit the config.
        """
        ...

    def split_into_tiles(self, pixels: Tensor) -> tuple[Tensor, list[int]]:
        """Split an image into tiles.

        Args:
            pixels: (3, H, W) uint8.

        Returns:
            The tiles for `encode`, and the token ids that replace the placeholder in the prompt.

        Raises:
            ParameterError: the image has no pixels.
        """
        ...

    def encode(self, tiles: Tensor) -> Tensor:
        """Return the image embeddings (n, hidden_size) of tiles, one row per patch token, in order."""
        ...
