"""Filling a model: every tensor of the file is used, every parameter is filled, or the error says which is not."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lamella.checkpoint.file_kinds import why_no_weights
from lamella.checkpoint.files import Checkpoint
from lamella.checkpoint.linear_methods import MethodChooser
from lamella.checkpoint.names import Target, targets
from lamella.checkpoint.quantization import DequantizedTensors, DequantizedView
from lamella.checkpoint.tensors import OpenTensors
from lamella.errors import CheckpointError, ConfigError
from lamella.layers.local_kit import LocalKit
from lamella.layers.parameters import initialize
from lamella.models.base import CausalLM
from lamella.models.names import rename
from lamella.parallel.group import Group
from lamella.parallel.sharding import Split
from lamella.validation import listed

logger = logging.getLogger("lamella")

LOAD_FORMATS = ("auto", "dummy")
_PIECE_BYTES = 1 << 30  # of a tensor that are in memory at a time: the experts of one layer may be many times as large
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(checkpoint: Checkpoint, dtype: torch.dtype | str) -> torch.dtype:
    """The dtype to compute in; "auto" is the checkpoint's own."""
    if isinstance(dtype, str) and dtype == "auto":
        stated = checkpoint.values.get("dtype") or checkpoint.values.get("torch_dtype")
        if not stated and checkpoint.quantization is not None:
            raise ConfigError("dtype='auto': the weights are quantised, and the config says no dtype to compute in")
        dtype = str(stated).removeprefix("torch.") if stated else _stored_dtype(checkpoint)
    return named_dtype(dtype)


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype that a name or a dtype means; other than those of `DTYPES` is a `ConfigError`."""
    if isinstance(dtype, str):
        dtype = {"half": "float16", "float": "float32"}.get(dtype, dtype)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r}: must be auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype={dtype}: must be {', '.join(DTYPES)}")
    return dtype


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Of the largest tensor: a few small ones, such as norms, may be wider than the rest."""
    with checkpoint.tensors.opened() as tensors:
        shapes = {name: shape for name in tensors.names() if (shape := tensors.shape(name))}
        if not shapes:
            return torch.float32
        name = max(shapes, key=lambda name: math.prod(shapes[name]))
        return tensors.load(name, (Split(shapes[name][0], ((0, 1),)),)).dtype


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    max_length: int | None = None,
    seed: int = 0,
    group: Group | None = None,
    expert_parallel: bool = False,
) -> CausalLM:
    """The model of a checkpoint in `dtype` on `device`; `load_format="dummy"` fills it at random instead.

    With a `group`, the part of it that this rank holds, of which alone the files are read; with `expert_parallel`, some
    of the experts whole.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format={load_format!r}: must be one of {', '.join(LOAD_FORMATS)}")
    config = checkpoint.read_config(max_length)
    dtype = resolve_dtype(checkpoint, dtype)
    if load_format == "dummy":
        model = checkpoint.allocate(config, LocalKit(dtype, device, group, expert_parallel))
        initialize(model, torch.Generator(device).manual_seed(seed))
    else:
        with checkpoint.tensors.opened() as tensors:
            chooser = MethodChooser(tensors, checkpoint.names)
            model = checkpoint.allocate(config, LocalKit(dtype, device, group, expert_parallel, chooser.choose))
            view = chooser.view(model)
            log_dequantization(checkpoint, view)
            fill(model, checkpoint, view)
    return model.eval().requires_grad_(False)


def log_dequantization(checkpoint: Checkpoint, view: OpenTensors) -> None:
    """Log, once per checkpoint, what of a quantized one is dequantized."""
    if isinstance(checkpoint.tensors, DequantizedTensors) and isinstance(view, DequantizedView):
        checkpoint.tensors.log(view)


@torch.no_grad()
def fill(model: CausalLM, checkpoint: Checkpoint, tensors: OpenTensors) -> None:
    """Copy every tensor into its place, converting its dtype; raises before anything is copied when names differ."""
    expected, redundant = match_tensors(checkpoint, model, tensors)
    for name, target in expected.items():
        if not target.place.numel():  # another rank's
            continue
        for piece in target.pieces(_PIECE_BYTES):
            if piece.load is not None:
                piece.load(name, piece.place, piece.splits, tensors)
                continue
            tensor = tensors.load(name, piece.splits)
            check_dtype(checkpoint.path, name, tensor)
            piece.place.copy_(tensor)
    for name in redundant:
        embedding = next(target for target in expected.values() if target.path == "model.embed_tokens.weight")
        copy = tensors.load(name, embedding.splits)
        if not torch.equal(copy.to(embedding.place.dtype), embedding.place.cpu()):
            logger.warning("%s: %s differs from the embedding it is tied to, and is not used", checkpoint.path, name)


def match_tensors(checkpoint: Checkpoint, model: CausalLM, tensors: OpenTensors) -> tuple[dict[str, Target], set[str]]:
    """Return where each tensor of the file goes in `model`, and the names of copies that are not needed.

    Raises:
        CheckpointError: tensors are missing or left over, or have another shape than the config says.
    """
    expected = _by_name_of_head(checkpoint, model, targets(model, checkpoint.names, tensors.names()), tensors)
    redundant = check_names(checkpoint, model, expected, tensors.names())
    for name, target in expected.items():
        check_shape(checkpoint, tensors, name, target)
    return expected, redundant


def _by_name_of_head(
    checkpoint: Checkpoint, model: CausalLM, expected: dict[str, Target], tensors: OpenTensors
) -> dict[str, Target]:
    """The targets, with a tied embedding under the name of the head where the files hold it under that name alone."""
    embedding, head = rename("model.embed_tokens.weight", checkpoint.names), rename("lm_head.weight", checkpoint.names)
    present = set(tensors.names())
    if not model.config.tie_word_embeddings or embedding in present or head not in present or head in expected:
        return expected
    return {head if name == embedding else name: target for name, target in expected.items()}


def check_dtype(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a quantised tensor."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}, and no scale of it is known")


def load_tensor(checkpoint: Checkpoint, tensors: OpenTensors, name: str, target: Target) -> Tensor:
    """What goes to `target` of the tensor, which must have its shape."""
    check_shape(checkpoint, tensors, name, target)
    return tensors.load(name, target.splits)


def check_shape(checkpoint: Checkpoint, tensors: OpenTensors, name: str, target: Target) -> None:
    """Refuse a tensor that is not of the shape that goes to `target`."""
    shape = tensors.shape(name)
    if shape != target.shape:
        raise CheckpointError(f"{checkpoint.path}: tensor {name} has shape {shape}, the config says {target.shape}")


def check_names(
    checkpoint: Checkpoint, model: CausalLM, targets_by_name: Mapping[str, Target], names: Iterable[str]
) -> set[str]:
    """Refuse a file whose tensors are not those of the model; returns the names of copies that are not needed.

    Raises:
        CheckpointError: tensors are missing or left over, with what the files are instead where that shows.
    """
    present = {name for name in names if not name.endswith("rotary_emb.inv_freq")}
    if not present:
        raise CheckpointError(f"{checkpoint.path}: {why_no_weights(checkpoint.path)}")
    expected = set(targets_by_name)
    redundant = present & {checkpoint.tied_head} if model.config.tie_word_embeddings else set()
    leftovers = checkpoint.architecture.leftovers(present - expected, expected)
    if leftovers:
        logger.info(
            "%s: %d tensors of parts that the config no longer has are not read: %s",
            checkpoint.path,
            len(leftovers),
            listed(sorted(leftovers)),
        )
    missing, unexpected = sorted(expected - present), sorted(present - expected - redundant - leftovers)
    if missing or unexpected:
        problems = {"missing": missing, "unexpected": unexpected}
        what = "; ".join(f"{kind}: {listed(some)}" for kind, some in problems.items() if some)
        advice = _way_out(checkpoint, missing, unexpected)
        raise CheckpointError(f"{checkpoint.path}: tensors do not fit {checkpoint.architecture.name}; {what}{advice}")
    return redundant


def _way_out(checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> str:
    """Advice for an error about names; empty where none is known."""
    if any(".lora_" in name or ".base_layer." in name for name in unexpected):
        return "; an adapter that is not merged: merge it (PeftModel.merge_and_unload(), then save_pretrained)"
    if missing == [rename("lm_head.weight", checkpoint.names)] and not unexpected:
        return "; if the head is the embedding: --hf-overrides '{\"tie_word_embeddings\": true}'"
    return ""
