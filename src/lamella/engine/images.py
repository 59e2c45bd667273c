"""Images in prompts: the tokens that stand for them, and the rows that a model's tower gives in place of these."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from lamella.distributed.group import Group
from lamella.errors import ParameterError
from lamella.layers.context import GivenEmbeddings
from lamella.models.base import ImageModel

if TYPE_CHECKING:
    from lamella.engine.scheduler import Scheduled


@dataclass(eq=False)
class Image:
    """What the requests with the same image share; it is gone with the last of them.

    Attributes:
        digest: of its pixels.
        tokens: that stand for it in a prompt.
        places: (n,) int64, which of these its rows stand for, ascending.
        tiles: what the tower takes, on the host, until it has been run.
        rows: (n, hidden_size) what it gave, on the device, from then on.
    """

    digest: bytes
    tokens: list[int]
    places: np.ndarray
    tiles: Tensor | None
    rows: Tensor | None = None


@dataclass(frozen=True)
class PlacedImage:
    """An image in a prompt.

    Attributes:
        places: (n,) int64, the prompt's tokens that its rows stand for, ascending.
        image: None on ranks other than 0, which are given the rows.
    """

    places: np.ndarray
    image: Image | None = None

    @property
    def first(self) -> int:
        return int(self.places[0])

    @property
    def last(self) -> int:
        return int(self.places[-1])

    @property
    def digest(self) -> bytes:
        assert self.image is not None
        return self.image.digest


class ImageReader:
    """Puts images into prompts, on the host. The tower is left to the step that first needs it, see `ImageRows`."""

    def __init__(self, model: ImageModel, limit: int | None = None) -> None:
        """At most `limit` images a prompt."""
        self.model, self.limit = model, limit
        self._known: WeakValueDictionary[bytes, Image] = WeakValueDictionary()

    @property
    def token_ids(self) -> frozenset[int]:
        """The tokens that a prompt without images must not have."""
        return frozenset((self.model.placeholder, self.model.patch))

    def place(self, token_ids: list[int], images: Sequence[Any]) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """The prompt with every placeholder written out, and where each image stands in it.

        Raises `ParameterError` where there are too many images, or not as many as placeholders. So does a token that
        stands for a part of an image, and not for itself: nothing but a placeholder brings these.
        """
        model = self.model
        name = f"{model.placeholder_text}, token {model.placeholder}"
        if self.limit is not None and len(images) > self.limit:
            raise ParameterError(f"multi_modal_data: {len(images)} images, and limit_mm_per_prompt allows {self.limit}")
        if (count := token_ids.count(model.placeholder)) != len(images):
            raise ParameterError(f"multi_modal_data: {len(images)} images for {count} placeholders ({name})")
        if model.patch in token_ids:
            raise ParameterError(
                f"prompt: token {model.patch} stands for a part of an image; give images, and a placeholder ({name}) "
                "for each"
            )
        written: list[int] = []
        placed: list[PlacedImage] = []
        for token in token_ids:
            if token == model.placeholder:
                image = self._read(images[len(placed)])
                placed.append(PlacedImage(image.places + len(written), image))
                written += image.tokens
            else:
                written.append(token)
        return written, tuple(placed)

    def _read(self, image: Any) -> Image:
        """Taken now, so that the caller may change the pixels."""
        pixels = pixels_of(image)
        digest = hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).digest()
        known = self._known.get(digest)
        if known is None:
            tiles, tokens = self.model.cut(pixels)
            places = np.flatnonzero(np.array(tokens) == self.model.patch)
            known = self._known[digest] = Image(digest, tokens, places, tiles)
        return known


def pixels_of(image: Any) -> Tensor:
    """(3, H, W) uint8 of what a caller gives as an image. Raises `ParameterError`."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
    elif isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.uint8:
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    elif hasattr(image, "convert"):  # of Pillow, which need not be installed
        try:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:  # its file is read only now, and each format has errors of its own
            raise ParameterError(f"multi_modal_data: an image cannot be read ({error})") from error
    else:
        pixels = torch.empty(0)
    if pixels.dim() != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
        kind = type(image).__name__
        what = f"{kind} {tuple(image.shape)} in {image.dtype}" if isinstance(image, Tensor | np.ndarray) else kind
        forms = "a PIL image, an array (H, W, 3) or a tensor (3, H, W), each in uint8"
        raise ParameterError(f"multi_modal_data: an image is {forms}, not {what}")
    return pixels.contiguous()


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
