"""Step feature that replaces the embeddings of placeholder tokens by image embeddings."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella.engine.images.reader import PromptImage
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.features import Fields, StepFeature
from lamella.layers.context import GivenEmbeddings
from lamella.parallel.group import Group
from lamella.vision.image_model import ImageModel


class ImageEmbeddings(StepFeature):
    """Adds image embeddings to steps. Only rank 0 has the vision encoder; the other ranks contribute zeros to a sum.

    The form of a step is its number of image tokens; None if it has none.
    """

    def __init__(
        self, hidden_size: int, dtype: torch.dtype, device: torch.device, group: Group, model: ImageModel | None
    ) -> None:
        self.hidden_size, self.dtype, self.device, self.group, self.model = hidden_size, dtype, device, group, model

    def can_replay(self, chunks: Sequence[Scheduled]) -> bool:
        """Return True if the step has no image tokens: graphs embed token ids only."""
        return not any(
            image.last >= chunk.start
            for chunk in chunks
            for image in chunk.request.attachments
            if isinstance(image, PromptImage)
        )

    def form(self, chunks: Sequence[Scheduled], replay: bool) -> Hashable:
        """Return the number of image tokens."""
        if replay or not any(chunk.request.attachments for chunk in chunks):
            return None
        return sum(high - low for _, low, high, _ in _images_of_step(chunks)) or None

    def fields(self, form: Hashable, requests: int) -> Fields:
        """Return the indices of the image tokens in the step."""
        return {"image_tokens": (np.int64, (form,))} if isinstance(form, int) else {}

    def fill(self, form: Hashable, arrays: Mapping[str, np.ndarray], chunks: Sequence[Scheduled]) -> None:
        """Write the indices of the image tokens."""
        if isinstance(form, int):
            indices = [image.positions[low:high] + offset for image, low, high, offset in _images_of_step(chunks)]
            np.concatenate(indices, out=arrays["image_tokens"])

    def context(
        self, form: Hashable, tensors: Mapping[str, Tensor], chunks: Sequence[Scheduled] | None
    ) -> Mapping[str, Any]:
        """Return the image embeddings of the step. Encodes images that no earlier step has needed."""
        if not isinstance(form, int) or chunks is None:
            return {}
        rows = torch.cat([self._embeddings(image)[low:high] for image, low, high, _ in _images_of_step(chunks)])
        return {"given": GivenEmbeddings(tensors["image_tokens"], self.group.all_reduce(rows))}

    def run_largest(self) -> None:
        """Encode an image of the largest size, if there is a vision encoder, to measure peak memory."""
        if self.model is not None:
            self.model.encode(torch.zeros(self.model.largest_shape, dtype=self.dtype, device=self.device))

    def _embeddings(self, prompt_image: PromptImage) -> Tensor:
        """Return the embeddings (num_image_tokens, hidden_size) of an image; zeros on ranks other than 0."""
        image = prompt_image.image
        if image is None:
            return torch.zeros(len(prompt_image.positions), self.hidden_size, dtype=self.dtype, device=self.device)
        if image.embeddings is None:
            assert self.model is not None and image.tiles is not None
            tiles = image.tiles.to(self.device, self.dtype, non_blocking=True)
            image.embeddings = self.model.encode(tiles).to(self.dtype)
            image.tiles = None
        return image.embeddings


def _images_of_step(chunks: Sequence[Scheduled]) -> list[tuple[PromptImage, int, int, int]]:
    """Return the images with tokens in a step.

    Returns:
        (image, low, high, offset): rows [low, high) of the image's embeddings belong to tokens of the step. Position p
        in the prompt is token p + offset of the step.
    """
    found, first = [], 0
    for chunk in chunks:
        for image in chunk.request.attachments:
            if isinstance(image, PromptImage):
                low, high = map(int, np.searchsorted(image.positions, (chunk.start, chunk.start + chunk.count)))
                if low < high:
                    found.append((image, low, high, first - chunk.start))
        first += chunk.count
    return found
