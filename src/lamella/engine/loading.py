"""Loading the parts of an engine: a rank's part of the model, and what reads images."""

from __future__ import annotations

import logging
from pkgutil import resolve_name

import torch

from lamella.checkpoint import load_model
from lamella.checkpoint.files import Checkpoint
from lamella.checkpoint.loader import resolve_dtype
from lamella.config import MoEConfig
from lamella.engine.options import EngineOptions
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import ConfigError
from lamella.layers.decoder import LanguageModel
from lamella.layers.local_kit import LocalKit
from lamella.layers.norm import RMSNorm
from lamella.parallel.group import Group
from lamella.parallel.sharding import Share
from lamella.vision.image_model import ImageModel

logger = logging.getLogger("lamella")


def check_split(checkpoint: Checkpoint, options: EngineOptions) -> None:
    """Raises `ConfigError` where the model cannot be divided among so many ranks. Nothing is loaded."""
    size, architecture = options.tensor_parallel_size, checkpoint.architecture
    path = architecture.import_path
    if size > 1 and (path is None or path.startswith("__main__:")):
        raise ConfigError(
            f"tensor_parallel_size={size}: {architecture.name} is defined in the main script, or is held by no module, "
            "so other processes cannot import it; put it into a module"
        )
    config, whole_experts = checkpoint.read_config(), options.enable_expert_parallel
    if whole_experts and not any(isinstance(layer.feed_forward, MoEConfig) for layer in config.layers):
        raise ConfigError("enable_expert_parallel=True: no layer of the model has experts")
    checkpoint.allocate(config, LocalKit(device="meta", group=Group(Share(0, size)), expert_parallel=whole_experts))


def load_part(checkpoint: Checkpoint, options: EngineOptions, device: torch.device, group: Group) -> LanguageModel:
    """Return a rank's part of the model."""
    max_length = options.resolve_length(checkpoint.read_config())
    return load_model(
        checkpoint,
        options.dtype,
        device,
        options.load_format,
        max_length,
        options.seed_number,
        group,
        options.enable_expert_parallel,
    )


def find_image_model(checkpoint: Checkpoint, load_format: str) -> type[ImageModel] | None:
    """Return the class that encodes images for a checkpoint; None if the checkpoint is of a text model.

    No tensor is read.

    Raises:
        ConfigError: the config and the tensors contradict each other.
        CheckpointError: the files cannot be read.
    """
    path = checkpoint.architecture.image_model
    if path is None:
        return None
    found: type[ImageModel] = resolve_name(path)
    return found if found.is_there(checkpoint, load_format) else None


def load_images(
    checkpoint: Checkpoint, options: EngineOptions, device: torch.device, tokenizer: Tokenizer | None
) -> ImageModel | None:
    """Return the part that reads the images of prompts; None where none are read."""
    loader, limit = find_image_model(checkpoint, options.load_format), options.limit_mm_per_prompt
    if loader is None:
        if limit is not None:
            raise ConfigError(f"limit_mm_per_prompt={dict(limit)!r}: the checkpoint of {options.model} reads no images")
        return None
    if options.max_images == 0:
        logger.info("%s: limit_mm_per_prompt allows no images: the part that reads them is left out", checkpoint.path)
        return None
    dtype = resolve_dtype(checkpoint, options.dtype)
    token_id = tokenizer.token_id if tokenizer is not None else lambda text: None
    return loader.load(checkpoint, dtype, device, token_id, options.load_format, options.seed_number)


def round_norms_twice(model: LanguageModel, dtype: torch.dtype) -> None:
    """Make the RMS norms of a 16-bit model round as `transformers` does. Raises `ConfigError` for float32."""
    if dtype == torch.float32:
        raise ConfigError("round_norms_twice=True: without effect, since float32 rounds nothing")
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.round_twice = True
