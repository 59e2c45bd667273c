"""Writing a checkpoint again as Hugging Face safetensors: from lingua files, and with the other rotation."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lamella.checkpoint.files import Checkpoint, open_checkpoint
from lamella.checkpoint.loader import check_names, load_tensor, resolve_dtype
from lamella.checkpoint.names import Target, targets
from lamella.checkpoint.tensors import INDEX, OpenTensors
from lamella.config import AttentionConfig, ModelConfig
from lamella.errors import CheckpointError, ConfigError
from lamella.layers.local_kit import LocalKit
from lamella.models.rope_order import permute_heads, rope_order

ROPES = ("keep", "huggingface", "lingua")
SHARD_BYTES = 5 << 30
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
)


def convert(
    source: str | Path,
    destination: str | Path,
    rope: str = "keep",
    shard_bytes: int = SHARD_BYTES,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Write the LlamaCanon checkpoint `source`, lingua or Hugging Face, to the new folder `destination`.

    `rope` "huggingface" or "lingua" reorders the channels of queries and keys so that the file's rotation pairs become
    (i, i + r/2) or (2i, 2i + 1); the model computes the same. The tensors keep their dtype. The source is only read,
    and the destination appears when it is complete. `overrides` are values in the place of the config file's.

    Raises `CheckpointError` where the destination exists or the tensors do not fit, `ConfigError` for a bad `rope`.
    """
    if rope not in ROPES:
        raise ConfigError(f"rope={rope!r}: must be one of {', '.join(ROPES)}")
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination}: is there already; nothing is overwritten")
    checkpoint = open_checkpoint(source, overrides)
    if "rope_version" not in checkpoint.values and checkpoint.architecture.name != "LlamaCanonForCausalLM":
        raise CheckpointError(f"{checkpoint.path}: only LlamaCanon checkpoints are converted")
    if checkpoint.quantization is not None:
        raise CheckpointError(f"{checkpoint.path}: quantised files are not converted")
    values = dict(checkpoint.values)
    current = values.get("rope_version", "huggingface")
    wanted = current if rope == "keep" else rope
    values |= {"rope_version": wanted, "dtype": str(resolve_dtype(checkpoint, "auto")).removeprefix("torch.")}
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as scratch:
        folder = Path(scratch) / destination.name
        folder.mkdir()
        with checkpoint.tensors.opened() as tensors:
            _write(folder, _tensors(checkpoint, tensors, None if wanted == current else wanted), shard_bytes)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        for pattern in _CARRIED:
            for file in checkpoint.path.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        folder.rename(destination)
    return destination


def _tensors(checkpoint: Checkpoint, tensors: OpenTensors, reorder: str | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, reordered where it has query and key channels."""
    config = checkpoint.read_config()
    model = checkpoint.allocate(config, LocalKit(device="meta"))
    old, new = targets(model, checkpoint.names), targets(model, checkpoint.architecture.checkpoint_names)
    check_names(checkpoint, model, old, tensors.names())
    for (source, target), name in zip(old.items(), new, strict=True):
        tensor = load_tensor(checkpoint, tensors, source, target)
        yield name, (_reordered(tensor, target, config, reorder) if reorder else tensor)


def _reordered(tensor: Tensor, target: Target, config: ModelConfig, to: str) -> Tensor:
    """The rows of query and key channels of one tensor in the new order; others are returned as they are."""
    parts = target.path.split(".")
    if "mixer" not in parts:
        return tensor
    mixer = config.layers[int(parts[parts.index("layers") + 1])].mixer
    assert isinstance(mixer, AttentionConfig)
    if mixer.rope is None:
        return tensor
    order, head = rope_order(mixer.head_dim, mixer.rope.dim, to), parts[parts.index("mixer") + 1]
    if head in ("q_proj", "k_proj", "q_norm", "k_norm"):
        return permute_heads(tensor, order)
    if head == "canon":
        queries_keys, values = tensor.split((mixer.query_size + mixer.kv_size, mixer.kv_size))
        return torch.cat((permute_heads(queries_keys, order), values))
    return tensor


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """One safetensors file, or several and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
