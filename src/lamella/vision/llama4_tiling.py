"""What Llama 4 makes of an image before it sees it: a grid of tiles, and the tokens that stand for them in a prompt.

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
# What a tokenizer calls the tokens, and where a config says them.
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
    """The token ids that surround and stand for tiles."""

    start: int = 200080
    end: int = 200081
    between_columns: int = 200084
    after_row: int = 200085
    image: int = 200090
    patch: int = 200092  # in whose place the rows of the tower stand

    @classmethod
    def read(cls, config: HFConfig, vocab_size: int, named: Callable[[str], int | None]) -> ImageTokens:
        """What the config says, else what the tokenizer has, `named` by the text, else what the released models have.

        Raises `ConfigError` where these differ, or an id is no token's, or that of several.
        """
        ids: dict[str, int] = {}
        for field in fields(cls):
            key, text = _KEYS.get(field.name), TEXTS[field.name]
            stated = None if key is None else config.int(key, None, minimum=0)
            known = named(text)
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
        """An image of so many tiles, of `patches` tokens each; more than one are followed by one of the whole image."""
        tokens = [self.start]
        if rows * columns > 1:
            line = [self.patch] * patches
            row = line + [token for _ in range(columns - 1) for token in (self.between_columns, *line)]
            tokens += [*row, self.after_row] * rows
        return [*tokens, self.image, *[self.patch] * patches, self.end]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How images are cut, see `grid` and `cut_tiles`."""

    tile: int = TILE
    max_tiles: int = MAX_TILES
    largest: bool = False

    @classmethod
    def read(cls, folder: Path, tile: int) -> Tiling:
        """What the checkpoint's preprocessor says, or transformers' defaults; `tile` is what the tower takes.

        Raises `ConfigError` where it does something else to the pixels than `cut_tiles` does.
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
    """Rows and columns of the tiles for an image: those that shrink it least, and of those that need not shrink it the
    ones with the least enlargement (or, for `largest`, with the most); the fewest where several do equally well.
    """
    if height < 1 or width < 1:
        raise ParameterError(f"an image of {height} x {width} pixels has nothing to see")
    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    sizes = torch.tensor(grids) * tile
    # In fp32, as there: which scales are equal is decided by it.
    scales = torch.minimum(sizes[:, 0] / height, sizes[:, 1] / width)
    enough = scales[scales >= 1]
    chosen = scales.max() if largest or not len(enough) else enough.min()
    return min((grids[index] for index in (scales == chosen).nonzero().flatten().tolist()), key=math.prod)


def cut_tiles(
    image: Tensor, tile: int = TILE, max_tiles: int = MAX_TILES, largest: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """An image (3, H, W) uint8 as tiles (N, 3, tile, tile) bfloat16 from -1 to 1, and their rows and columns.

    Line by line, and then, of more than one, the whole image once more in a single tile.
    """
    if image.dtype != torch.uint8 or image.dim() != 3:
        raise ParameterError(
            f"an image is (channels, height, width) in uint8, not {tuple(image.shape)} in {image.dtype}"
        )
    height, width = image.shape[1:]
    rows, columns = grid(height, width, tile, max_tiles, largest)
    room = rows * tile, columns * tile
    # It is not enlarged beyond one tile's side unless that is asked for.
    target = room if largest else (min(max(height, tile), room[0]), min(max(width, tile), room[1]))
    resized = _resize(image, fit(height, width, target))
    padded = F.pad(resized, (0, room[1] - resized.shape[2], 0, room[0] - resized.shape[1]))
    tiles = padded.unflatten(1, (rows, tile)).unflatten(3, (columns, tile)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if rows * columns > 1:
        tiles = torch.cat((tiles, _resize(image, (tile, tile))[None]))
    return (tiles.to(torch.bfloat16) * (1 / 255) - _MEAN) / _STD, (rows, columns)


def fit(height: int, width: int, room: tuple[int, int]) -> tuple[int, int]:
    """The largest size within `room` of the image's proportions, at least a pixel each way."""
    down, across = room[0] / height, room[1] / width
    if across < down:
        return max(1, min(math.floor(height * across), room[0])), room[1]
    return room[0], max(1, min(math.floor(width * down), room[1]))


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, with the frequencies that the smaller image cannot hold filtered out; uint8."""
    if tuple(image.shape[1:]) == size:
        return image
    wide = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)[0]
    return wide.round().clamp(0, 255).to(torch.uint8)
