"""Loading of weights into a model. Every tensor of the files must be used, and every parameter filled."""

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
_PIECE_BYTES = 1 << 30  # bytes of a tensor in memory at a time; the experts of one layer may be many times larger
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(checkpoint: Checkpoint, dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype to compute in; "auto" is the dtype of the checkpoint.

    Raises:
        ConfigError: the name is unknown, or "auto" is given for a quantized checkpoint whose config states no dtype.
    """
    if isinstance(dtype, str) and dtype == "auto":
        stated = checkpoint.values.get("dtype") or checkpoint.values.get("torch_dtype")
        if not stated and checkpoint.quantization is not None:
            raise ConfigError(
                "dtype='auto': the weights are quantised, and the config says no dtype to compute in; give one, such "
                "as dtype='bfloat16'"
            )
        dtype = str(stated).removeprefix("torch.") if stated else _stored_dtype(checkpoint)
    return named_dtype(dtype)


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of a name; a dtype is returned as it is.

    Raises:
        ConfigError: the dtype is not in `DTYPES`.
    """
    if isinstance(dtype, str):
        dtype = {"half": "float16", "float": "float32"}.get(dtype, dtype)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r}: must be auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype={dtype}: must be {', '.join(DTYPES)}")
    return dtype


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the largest tensor. Small ones, such as norms, may have higher precision."""
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
    """Load the model of a checkpoint.

    Args:
        checkpoint: to load.
        dtype: to compute in; "auto" is the dtype of the checkpoint.
        device: of the parameters.
        load_format: "auto", or "dummy" for random weights.
        max_length: context length that the engine will use, in tokens; None if unknown.
        seed: of random weights.
        group: tensor-parallel group. Only the shard of this rank is read. None: the whole model.
        expert_parallel: True if each rank has some whole experts, False if it has a shard of every expert.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        ConfigError: the config, `dtype` or `load_format` is not supported.
        CheckpointError: the tensors do not fit the config.
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
    """Log, once per quantized checkpoint, how many tensors are dequantized."""
    if isinstance(checkpoint.tensors, DequantizedTensors) and isinstance(view, DequantizedView):
        checkpoint.tensors.log(view)


@torch.no_grad()
def fill(model: CausalLM, checkpoint: Checkpoint, tensors: OpenTensors) -> None:
    """Copy every tensor to its parameter, and convert its dtype.

    Raises:
        CheckpointError: names or shapes differ, in which case nothing is copied; or a tensor is quantized without a
            known scale.
    """
    expected, redundant = match_tensors(checkpoint, model, tensors)
    for name, target in expected.items():
        if not target.destination.numel():  # belongs to another rank
            continue
        for piece in target.pieces(_PIECE_BYTES):
            if piece.load is not None:
                piece.load(name, piece.destination, piece.splits, tensors)
                continue
            tensor = tensors.load(name, piece.splits)
            check_dtype(checkpoint.path, name, tensor)
            piece.destination.copy_(tensor)
    for name in redundant:
        embedding = next(target for target in expected.values() if target.path == "model.embed_tokens.weight")
        copy = tensors.load(name, embedding.splits)
        if not torch.equal(copy.to(embedding.destination.dtype), embedding.destination.cpu()):
            logger.warning("%s: %s differs from the embedding it is tied to, and is not used", checkpoint.path, name)


def match_tensors(checkpoint: Checkpoint, model: CausalLM, tensors: OpenTensors) -> tuple[dict[str, Target], set[str]]:
    """Return the target in `model` of each tensor of the files, and the names of redundant copies.

    Raises:
        CheckpointError: tensors are missing or unexpected, or have another shape than the config implies.
    """
    expected = _by_name_of_head(checkpoint, model, targets(model, checkpoint.names, tensors.names()), tensors)
    redundant = check_names(checkpoint, model, expected, tensors.names())
    for name, target in expected.items():
        check_shape(checkpoint, tensors, name, target)
    return expected, redundant


def _by_name_of_head(
    checkpoint: Checkpoint, model: CausalLM, expected: dict[str, Target], tensors: OpenTensors
) -> dict[str, Target]:
    """Return the targets, with a tied embedding under the name of the head if the files have only that name."""
    embedding, head = rename("model.embed_tokens.weight", checkpoint.names), rename("lm_head.weight", checkpoint.names)
    present = set(tensors.names())
    if not model.config.tie_word_embeddings or embedding in present or head not in present or head in expected:
        return expected
    return {head if name == embedding else name: target for name, target in expected.items()}


def check_dtype(path: Path, name: str, tensor: Tensor) -> None:
    """Reject a quantized tensor.

    Raises:
        CheckpointError: the tensor is not floating point, or has fewer than 16 bits.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise CheckpointError(
            f"{path}: tensor {name} is {tensor.dtype}, and no scale of it is known; take files with 16-bit weights"
        )


def load_tensor(checkpoint: Checkpoint, tensors: OpenTensors, name: str, target: Target) -> Tensor:
    """Read the part of a tensor that belongs to `target`, after a check of its shape."""
    check_shape(checkpoint, tensors, name, target)
    return tensors.load(name, target.splits)


def check_shape(checkpoint: Checkpoint, tensors: OpenTensors, name: str, target: Target) -> None:
    """Check that a tensor of the files has the shape that its target needs.

    Raises:
        CheckpointError: it has another shape.
    """
    shape = tensors.shape(name)
    if shape != target.shape:
        raise CheckpointError(f"{checkpoint.path}: tensor {name} has shape {shape}, the config says {target.shape}")


def check_names(
    checkpoint: Checkpoint, model: CausalLM, targets_by_name: Mapping[str, Target], names: Iterable[str]
) -> set[str]:
    """Check that the files contain exactly the tensors of the model.

    Returns:
        Names of redundant copies, such as a tied head.

    Raises:
        CheckpointError: there are no weights, or tensors are missing or unexpected.
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
    """Return the advice of an error about names; empty if there is none."""
    if any(".lora_" in name or ".base_layer." in name for name in unexpected):
        return "; an adapter that is not merged: merge it (PeftModel.merge_and_unload(), then save_pretrained)"
    if missing == [rename("lm_head.weight", checkpoint.names)] and not unexpected:
        return "; if the head is the embedding: --hf-overrides '{\"tie_word_embeddings\": true}'"
    return ""
