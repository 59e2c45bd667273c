"""The rows that a model's tower gives, in place of the tokens that stand for images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lamella.engine.images.reader import PlacedImage
from lamella.engine.scheduler import Scheduled
from lamella.layers.context import GivenEmbeddings
from lamella.parallel.group import Group
from lamella.vision.image_model import ImageModel


class ImageRows:
    """Gives steps the rows of their images, the same on every rank: only rank 0 has the tower."""

    def __init__(
        self, hidden_size: int, dtype: torch.dtype, device: torch.device, group: Group, model: ImageModel | None
    ) -> None:
        self.hidden_size, self.dtype, self.device, self.group, self.model = hidden_size, dtype, device, group, model

    def of(self, shares: Sequence[Scheduled]) -> GivenEmbeddings | None:
        """What stands in place of tokens of a step with these shares, in this order; None where nothing does.

        Images that no step has needed before go through the tower.
        """
        if not any(share.request.images for share in shares):
            return None
        tokens, rows, first = [], [], 0
        for share in shares:
            for placed in share.request.images:
                low, high = np.searchsorted(placed.places, (share.start, share.start + share.count))
                if low < high:
                    tokens.append(placed.places[low:high] + (first - share.start))
                    rows.append(self._rows(placed)[low:high])
            first += share.count
        if not tokens:
            return None
        where = torch.from_numpy(np.concatenate(tokens)).to(self.device, non_blocking=True)
        return GivenEmbeddings(where, self.group.all_reduce(torch.cat(rows)))

    def run_largest(self) -> None:
        """The tower, where there is one, on the most tiles that an image can become."""
        if self.model is not None:
            self.model.rows(torch.zeros(self.model.largest, dtype=self.dtype, device=self.device))

    def _rows(self, placed: PlacedImage) -> Tensor:
        """(n, hidden_size), zeros on ranks other than 0."""
        image = placed.image
        if image is None:
            return torch.zeros(len(placed.places), self.hidden_size, dtype=self.dtype, device=self.device)
        if image.rows is None:
            assert self.model is not None and image.tiles is not None
            image.rows = self.model.rows(image.tiles.to(self.device, self.dtype, non_blocking=True)).to(self.dtype)
            image.tiles = None
        return image.rows
