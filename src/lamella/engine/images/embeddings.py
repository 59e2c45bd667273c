"""Images as a feature of a step: image embeddings in place of token embeddings."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella.engine.images.reader import PlacedImage
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.features import Fields, StepFeature
from lamella.layers.context import GivenEmbeddings
from lamella.parallel.group import Group
from lamella.vision.image_model import ImageModel


class ImageEmbeddings(StepFeature):
    """Gives steps the embeddings of their images. Only rank 0 has the vision encoder; the other ranks add zeros.

    The form of a step is its number of image tokens; None without any.
    """

    def __init__(
        self, hidden_size: int, dtype: torch.dtype, device: torch.device, group: Group, model: ImageModel | None
    ) -> None:
        self.hidden_size, self.dtype, self.device, self.group, self.model = hidden_size, dtype, device, group, model

    def can_replay(self, chunks: Sequence[Scheduled]) -> bool:
        """A graph embeds token ids only."""
        return not any(
            placed.last >= chunk.start
            for chunk in chunks
            for placed in chunk.request.attachments
            if isinstance(placed, PlacedImage)
        )

    def form(self, chunks: Sequence[Scheduled], replay: bool) -> Hashable:
        """Return the number of image tokens."""
        if replay or not any(chunk.request.attachments for chunk in chunks):
            return None
        return sum(high - low for _, low, high, _ in _visible(chunks)) or None

    def fields(self, form: Hashable, requests: int) -> Fields:
        """Return the indices of the image tokens in the step."""
        return {"image_tokens": (np.int64, (form,))} if isinstance(form, int) else {}

    def fill(self, form: Hashable, arrays: Mapping[str, np.ndarray], chunks: Sequence[Scheduled]) -> None:
        """Write the indices."""
        if isinstance(form, int):
            parts = [placed.places[low:high] + offset for placed, low, high, offset in _visible(chunks)]
            np.concatenate(parts, out=arrays["image_tokens"])

    def context(
        self, form: Hashable, tensors: Mapping[str, Tensor], chunks: Sequence[Scheduled] | None
    ) -> Mapping[str, Any]:
        """Return the embeddings. Images that no step has needed before go through the vision encoder now."""
        if not isinstance(form, int) or chunks is None:
            return {}
        rows = torch.cat([self._rows(placed)[low:high] for placed, low, high, _ in _visible(chunks)])
        return {"given": GivenEmbeddings(tensors["image_tokens"], self.group.all_reduce(rows))}

    def run_largest(self) -> None:
        """Run the vision encoder, if there is one, on the largest image, to measure its memory."""
        if self.model is not None:
            self.model.encode(torch.zeros(self.model.largest_shape, dtype=self.dtype, device=self.device))

    def _rows(self, placed: PlacedImage) -> Tensor:
        """Return the embeddings (n, hidden_size) of an image; zeros on ranks other than 0."""
        image = placed.image
        if image is None:
            return torch.zeros(len(placed.places), self.hidden_size, dtype=self.dtype, device=self.device)
        if image.rows is None:
            assert self.model is not None and image.tiles is not None
            image.rows = self.model.encode(image.tiles.to(self.device, self.dtype, non_blocking=True)).to(self.dtype)
            image.tiles = None
        return image.rows


def _visible(chunks: Sequence[Scheduled]) -> list[tuple[PlacedImage, int, int, int]]:
    """Return the images of a step: image, first and last + 1 of its rows in the step, and what to add to positions.

    The sum of a row's position in the prompt and the last number is its token's index in the step.
    """
    found, first = [], 0
    for chunk in chunks:
        for placed in chunk.request.attachments:
            if isinstance(placed, PlacedImage):
                low, high = map(int, np.searchsorted(placed.places, (chunk.start, chunk.start + chunk.count)))
                if low < high:
                    found.append((placed, low, high, first - chunk.start))
        first += chunk.count
    return found
