"""Llama 4's image preprocessing: a grid of tiles, and the tokens that represent the tiles in a prompt.

Rules: transformers' `image_processing_llama4.py` and `processing_llama4.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella.checkpoint.file_kinds import read_json
from lamella.config.hf_config import HFConfig
from lamella.errors import ConfigError, ParameterError

TILE = 336  # pixels
MAX_TILES = 16
_MEAN = _STD = 0.5
# Texts of the tokens in a tokenizer, and keys of the tokens in a config.
TEXTS = {
    "start": "<|image_start|>",
    "end": "<|image_end|>",
    "between_columns": "<|tile_x_separator|>",
    "after_row": "<|tile_y_separator|>",
    "image": "<|image|>",
    "patch": "<|patch|>",
}
_KEYS = {"start": "boi_token_index", "end": "eoi_token_index", "patch": "image_token_index"}


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Ids of the tokens that surround and represent tiles.

    Attributes:
        start: before an image.
        end: after an image.
        between_columns: between two tiles of a row.
        after_row: after a row of tiles.
        image: before the tile of the whole image; also the placeholder in a prompt.
        patch: replaced by the embeddings of the vision encoder.
    """

    start: int = 200080
    end: int = 200081
    between_columns: int = 200084
    after_row: int = 200085
    image: int = 200090
    patch: int = 200092

    @classmethod
    def read(cls, config: HFConfig, vocab_size: int, token_id: Callable[[str], int | None]) -> ImageTokens:
        """Read the ids from the config, or else from the tokenizer, or else use those of the released models.

        Args:
            config: config of the whole model.
            vocab_size: number of tokens in the vocabulary.
            token_id: returns the tokenizer's id for the text of a token, or None.

        Raises:
            ConfigError: config and tokenizer differ, or an id is outside the vocabulary or used twice.
        """
        ids: dict[str, int] = {}
        for field in fields(cls):
            key, text = _KEYS.get(field.name), TEXTS[field.name]
            stated = None if key is None else config.int(key, None, minimum=0)
            known = token_id(text)
            if stated is not None and known is not None and stated != known:
                raise ConfigError(f"{config.source}: {key}={stated}: the tokenizer's {text} is {known}")
            token = stated if stated is not None else known if known is not None else getattr(cls, field.name)
            if token >= vocab_size:
                raise ConfigError(f"{config.source}: {key or text}={token}: must be below vocab_size={vocab_size}")
            if token in ids.values():
                raise ConfigError(f"{config.source}: {key or text}={token}: another token of images is the same")
            ids[field.name] = token
        return cls(**ids)

    def expand(self, rows: int, columns: int, patches: int) -> list[int]:
        """Return the tokens of an image.

        Args:
            rows: rows of tiles.
            columns: columns of tiles.
            patches: patch tokens per tile. With several tiles, one tile of the whole image follows them.
        """
        tokens = [self.start]
        if rows * columns > 1:
            line = [self.patch] * patches
            row = line + [token for _ in range(columns - 1) for token in (self.between_columns, *line)]
            tokens += [*row, self.after_row] * rows
        return [*tokens, self.image, *[self.patch] * patches, self.end]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Rules for splitting an image into tiles, see `grid` and `split_image`.

    Attributes:
        tile: side of a tile, in pixels.
        max_tiles: maximum number of tiles, without the tile of the whole image.
        largest: whether to enlarge images as far as `max_tiles` allows.
    """

    tile: int = TILE
    max_tiles: int = MAX_TILES
    largest: bool = False

    @classmethod
    def read(cls, folder: Path, tile: int) -> Tiling:
        """Read the rules from the checkpoint's preprocessor config; use transformers' defaults if there is none.

        Args:
            folder: folder of the checkpoint.
            tile: side of the vision encoder's input, in pixels.

        Raises:
            ConfigError: the preprocessor does something that `split_image` does not.
        """
        own, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
        file = own if own.is_file() or not whole.is_file() else whole
        values = read_json(file) if file.is_file() else {}
        config = HFConfig(values if file is own else values.get("image_processor") or {}, str(file))
        for key in ("do_resize", "do_rescale", "do_normalize"):
            config.choice(key, (True,), True)
        config.choice("do_center_crop", (False,), False)
        config.choice("resample", (2,), 2)  # bilinear
        config.choice("rescale_factor", (1 / 255,), 1 / 255)
        config.choice("image_mean", ([_MEAN] * 3,), [_MEAN] * 3)
        config.choice("image_std", ([_STD] * 3,), [_STD] * 3)
        config.choice("size", ({"height": tile, "width": tile},), {"height": tile, "width": tile})
        return cls(
            tile=tile,
            max_tiles=config.int("max_patches", MAX_TILES),
            largest=config.bool("resize_to_max_canvas", False),
        )


def grid(
    height: int, width: int, tile: int = TILE, max_tiles: int = MAX_TILES, largest: bool = False
) -> tuple[int, int]:
    """Choose the grid of tiles for an image.

    The grid must shrink the image as little as possible. Among grids that do not shrink it, the one that enlarges it
    least is chosen, or with `largest` the one that enlarges it most. Ties are resolved to the fewest tiles.

    Args:
        height: height of the image, in pixels.
        width: width of the image, in pixels.
        tile: side of a tile, in pixels.
        max_tiles: maximum number of tiles.
        largest: whether to enlarge images as far as possible.

    Returns:
        Rows and columns.

    Raises:
        ParameterError: the image has no pixels.
    """
    if height < 1 or width < 1:
        raise ParameterError(f"an image of {height} x {width} pixels has nothing to see")
    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    sizes = torch.tensor(grids) * tile
    # In fp32 as in transformers, because rounding decides which scales are equal.
    scales = torch.minimum(sizes[:, 0] / height, sizes[:, 1] / width)
    enough = scales[scales >= 1]
    chosen = scales.max() if largest or not len(enough) else enough.min()
    return min((grids[index] for index in (scales == chosen).nonzero().flatten().tolist()), key=math.prod)


def split_image(
    image: Tensor, tile: int = TILE, max_tiles: int = MAX_TILES, largest: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Resize an image and split it into tiles.

    Args:
        image: (3, H, W) uint8.
        tile: side of a tile, in pixels.
        max_tiles: maximum number of tiles.
        largest: whether to enlarge images as far as possible.

    Returns:
        The tiles (N, 3, tile, tile) bfloat16 in [-1, 1], line by line, and the grid (rows, columns). With several
        tiles, one more tile shows the whole image.

    Raises:
        ParameterError: the image has another shape or dtype, or no pixels.
    """
    if image.dtype != torch.uint8 or image.dim() != 3:
        raise ParameterError(
            f"an image is (channels, height, width) in uint8, not {tuple(image.shape)} in {image.dtype}"
        )
    height, width = image.shape[1:]
    rows, columns = grid(height, width, tile, max_tiles, largest)
    canvas = rows * tile, columns * tile
    # Enlarge the image at most to one tile's side, unless `largest`.
    target = canvas if largest else (min(max(height, tile), canvas[0]), min(max(width, tile), canvas[1]))
    resized = _resize(image, fit(height, width, target))
    padded = F.pad(resized, (0, canvas[1] - resized.shape[2], 0, canvas[0] - resized.shape[1]))
    tiles = padded.unflatten(1, (rows, tile)).unflatten(3, (columns, tile)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if rows * columns > 1:
        tiles = torch.cat((tiles, _resize(image, (tile, tile))[None]))
    return (tiles.to(torch.bfloat16) * (1 / 255) - _MEAN) / _STD, (rows, columns)


def fit(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size within `canvas` with the image's proportions, at least one pixel in each direction."""
    down, across = canvas[0] / height, canvas[1] / width
    if across < down:
        return max(1, min(math.floor(height * across), canvas[0])), canvas[1]
    return canvas[0], max(1, min(math.floor(width * down), canvas[1]))


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by bilinear interpolation with antialiasing; return uint8."""
    if tuple(image.shape[1:]) == size:
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)
