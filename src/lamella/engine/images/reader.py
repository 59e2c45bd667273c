"""Images in prompts, and the tokens that stand for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from lamella.errors import ParameterError
from lamella.vision.image_model import ImageModel


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
    """Puts images into prompts, on the host. The tower is left to the step that first needs it, see `image_rows`."""

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
            tiles, tokens = self.model.split_into_tiles(pixels)
            places = np.flatnonzero(np.array(tokens) == self.model.patch)
            known = self._known[digest] = Image(digest, tokens, places, tiles)
        return known


def place_images(
    reader: ImageReader | None, token_ids: list[int], images: Sequence[Any], limit: int | None
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """Return a prompt's tokens with the images in their places; without a reader, images are a `ParameterError`."""
    if reader is not None:
        return reader.place(token_ids, images)
    if images:
        why = "limit_mm_per_prompt allows 0" if limit == 0 else "the model reads none"
        raise ParameterError(f"multi_modal_data: {len(images)} images, and {why}")
    return token_ids, ()


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
