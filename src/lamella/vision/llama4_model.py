"""Llama 4's image model: tiling, tokens and vision encoder together."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lamella.checkpoint.files import Checkpoint
from lamella.config.hf_config import HFConfig
from lamella.errors import ConfigError
from lamella.layers.parameters import initialize
from lamella.vision.llama4_encoder import Vision, VisionConfig, vision_tensors
from lamella.vision.llama4_tiling import TEXTS, ImageTokens, Tiling, split_image

logger = logging.getLogger("lamella")


class Llama4ImageModel:
    """`ImageModel` of Llama 4.

    Attributes:
        vision: vision encoder with projector.
        tokens: ids of the image tokens.
        tiling: rules for tiles.
    """

    def __init__(self, vision: Vision, tokens: ImageTokens, tiling: Tiling) -> None:
        self.vision, self.tokens, self.tiling = vision, tokens, tiling
        self.placeholder, self.placeholder_text, self.patch = tokens.image, TEXTS["image"], tokens.patch
        # An image of several tiles has one more tile that shows the whole image.
        count = tiling.max_tiles + (tiling.max_tiles > 1)
        self.largest_shape: tuple[int, ...] = (count, vision.config.channels, tiling.tile, tiling.tile)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str,
        token_id: Callable[[str], int | None],
        load_format: str,
        seed: int,
    ) -> Llama4ImageModel:
        """Load the vision encoder of a checkpoint; see `ImageModel.load`."""
        values = checkpoint.hf_config(checkpoint.values)
        config = VisionConfig.read(values)
        if config.channels != 3:
            raise ConfigError(f"{checkpoint.config_file}: num_channels={config.channels}: images have 3")
        vocab_size = HFConfig(values.mapping("text_config"), values.source).int("vocab_size", 202048)
        tokens = ImageTokens.read(values, vocab_size, token_id)
        tiling = Tiling.read(checkpoint.path, config.image_size)
        vision = Vision.allocate(config, dtype, device)
        if load_format == "dummy":
            initialize(vision, torch.Generator(device).manual_seed(seed))
        else:
            vision.fill(checkpoint.path)
        return cls(vision, tokens, tiling)

    @staticmethod
    def has_encoder(checkpoint: Checkpoint, load_format: str) -> bool:
        """Return True if the checkpoint has vision tensors; see `ImageModel.has_encoder`."""
        stated = bool(checkpoint.values.get("vision_config"))
        if stated and load_format == "dummy":
            return True
        with vision_tensors(checkpoint.path).opened() as tensors:
            names = tensors.names()
        if names and not stated:
            raise ConfigError(f"{checkpoint.config_file}: vision_config is missing, and there is {names[0]}")
        if not names:
            logger.info("%s: no tensors of a vision part: served as a text model", checkpoint.path)
        return bool(names)

    def split_into_tiles(self, pixels: Tensor) -> tuple[Tensor, list[int]]:
        """Split an image into tiles; see `ImageModel.split_into_tiles`."""
        tiling = self.tiling
        tiles, (rows, columns) = split_image(pixels, tiling.tile, tiling.max_tiles, tiling.largest)
        return tiles, self.tokens.expand(rows, columns, self.vision.config.rows_per_tile)

    def encode(self, tiles: Tensor) -> Tensor:
        """Return the image embeddings (n, hidden_size) of tiles."""
        return self.vision(tiles).flatten(0, 1)
