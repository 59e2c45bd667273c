"""Reading of images, and expansion of image placeholders in prompts."""

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
    """Image that is shared by all requests with the same pixels, and freed with the last of them.

    Attributes:
        digest: hash of the pixels.
        tokens: tokens that replace the placeholder in a prompt.
        positions: (num_image_tokens,) int64, indices of the image tokens in `tokens`, ascending.
        tiles: input of the vision encoder, on the host; None once the image is encoded.
        embeddings: (num_image_tokens, hidden_size) on the device; None before the image is encoded.
    """

    digest: bytes
    tokens: list[int]
    positions: np.ndarray
    tiles: Tensor | None
    embeddings: Tensor | None = None


@dataclass(frozen=True)
class PromptImage:
    """Image in a prompt.

    Attributes:
        positions: (num_image_tokens,) int64, positions of its image tokens in the prompt, ascending.
        image: the image; None on ranks other than 0, which receive the embeddings from rank 0.
    """

    positions: np.ndarray
    image: Image | None = None

    @property
    def first(self) -> int:
        """Position of the first image token."""
        return int(self.positions[0])

    @property
    def last(self) -> int:
        """Position of the last image token."""
        return int(self.positions[-1])

    @property
    def digest(self) -> bytes:
        """Hash of the pixels."""
        assert self.image is not None
        return self.image.digest


class ImageReader:
    """Reads images of prompts on the host. The first step that needs an image encodes it, see `ImageEmbeddings`."""

    def __init__(self, model: ImageModel, limit: int | None = None) -> None:
        """Make a reader.

        Args:
            model: vision encoder with its preprocessing.
            limit: most images per prompt; None: no limit.
        """
        self.model, self.limit = model, limit
        self._images: WeakValueDictionary[bytes, Image] = WeakValueDictionary()

    @property
    def token_ids(self) -> frozenset[int]:
        """Placeholder and image tokens, which a prompt without images must not contain."""
        return frozenset((self.model.placeholder, self.model.patch))

    def expand(self, token_ids: list[int], images: Sequence[Any]) -> tuple[list[int], tuple[PromptImage, ...]]:
        """Replace each placeholder token by the tokens of its image.

        Args:
            token_ids: prompt with one placeholder token per image.
            images: in the order of the placeholders.

        Returns:
            The expanded prompt, and its images.

        Raises:
            ParameterError: too many images, fewer or more images than placeholders, an unreadable image, or an image
                token in the prompt itself.
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
        expanded: list[int] = []
        found: list[PromptImage] = []
        for token in token_ids:
            if token == model.placeholder:
                image = self._read(images[len(found)])
                found.append(PromptImage(image.positions + len(expanded), image))
                expanded += image.tokens
            else:
                expanded.append(token)
        return expanded, tuple(found)

    def _read(self, image: Any) -> Image:
        """Return the image with these pixels; a new one if no running request has it. Copies the pixels."""
        pixels = read_pixels(image)
        digest = hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).digest()
        found = self._images.get(digest)
        if found is None:
            tiles, tokens = self.model.split_into_tiles(pixels)
            positions = np.flatnonzero(np.array(tokens) == self.model.patch)
            found = self._images[digest] = Image(digest, tokens, positions, tiles)
        return found


def expand_images(
    reader: ImageReader | None, token_ids: list[int], images: Sequence[Any], limit: int | None
) -> tuple[list[int], tuple[PromptImage, ...]]:
    """Expand the image placeholders of a prompt, see `ImageReader.expand`.

    Args:
        reader: None if the engine accepts no images.
        token_ids: prompt with one placeholder token per image.
        images: in the order of the placeholders.
        limit: of `limit_mm_per_prompt`, for the error message.

    Raises:
        ParameterError: there are images and no reader, or the images do not fit the prompt.
    """
    if reader is not None:
        return reader.expand(token_ids, images)
    if images:
        why = "limit_mm_per_prompt allows 0" if limit == 0 else "the model reads none"
        raise ParameterError(f"multi_modal_data: {len(images)} images, and {why}")
    return token_ids, ()


def read_pixels(image: Any) -> Tensor:
    """Return the pixels (3, H, W) uint8 of an image.

    Args:
        image: a Pillow image, an array (H, W, 3) uint8, or a tensor (3, H, W) uint8.

    Raises:
        ParameterError: `image` is of another kind, or cannot be read.
    """
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
    elif isinstance(image, np.ndarray) and image.ndim == 3 and image.dtype == np.uint8:
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    elif hasattr(image, "convert"):  # a Pillow image; no isinstance, since Pillow may not be installed
        try:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:  # `convert` reads the file, and each format raises its own errors
            raise ParameterError(f"multi_modal_data: an image cannot be read ({error})") from error
    else:
        pixels = torch.empty(0)
    if pixels.dim() != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
        kind = type(image).__name__
        what = f"{kind} {tuple(image.shape)} in {image.dtype}" if isinstance(image, Tensor | np.ndarray) else kind
        forms = "a PIL image, an array (H, W, 3) or a tensor (3, H, W), each in uint8"
        raise ParameterError(f"multi_modal_data: an image is {forms}, not {what}")
    return pixels.contiguous()
