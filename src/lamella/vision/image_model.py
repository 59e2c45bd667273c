"""The protocol between the engine and a model that reads images."""

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
        placeholder, placeholder_text: token that marks an image in a prompt, and its text.
        patch: token at whose positions image embeddings replace token embeddings.
        largest: shape of the tiles tensor of the largest image.
    """

    placeholder: int
    placeholder_text: str
    patch: int
    largest: tuple[int, ...]

    @staticmethod
    def is_there(checkpoint: Checkpoint, load_format: str) -> bool:
        """Return True if the checkpoint has a vision encoder; otherwise the log says so. No tensor is read.

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
        """Load the vision encoder of a checkpoint; `token_id` returns the tokenizer's id of a token's text, or None.

        Raises:
            ConfigError: the config or the tokenizer lacks something.
            CheckpointError: the tensors do not fit.
        """
        ...

    def cut(self, pixels: Tensor) -> tuple[Tensor, list[int]]:
        """Return an image (3, H, W) uint8 as tiles for the encoder, and the tokens that replace the placeholder.

        Raises:
            ParameterError: the image has no pixels.
        """
        ...

    def rows(self, tiles: Tensor) -> Tensor:
        """Encode tiles into image embeddings (n, hidden_size), one row for each patch token, in order."""
        ...
