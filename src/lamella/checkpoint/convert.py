"""Conversion of GGUF and lingua checkpoints to Hugging Face folders, and of the channel order of RoPE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lamella.checkpoint.files import Checkpoint, open_checkpoint
from lamella.checkpoint.loader import check_names, load_tensor, resolve_dtype
from lamella.checkpoint.names import Target, targets
from lamella.checkpoint.tensors import INDEX, OpenTensors
from lamella.checkpoint.tokenizer_files import chat_templates_of, load_tokenizer
from lamella.config import AttentionConfig, ModelConfig
from lamella.errors import CheckpointError, ConfigError
from lamella.files import copy_file, new_folder, write_json, writing
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
    dtype: str = "auto",
) -> Path:
    """Convert a GGUF file or a LlamaCanon checkpoint to a Hugging Face folder. The source does not change.

    Args:
        source: GGUF file, or LlamaCanon checkpoint in lingua's or Hugging Face's format.
        destination: new folder. It appears only when it is complete.
        rope: for LlamaCanon, the channel order of queries and keys in the new files: "huggingface" rotates pairs
            (i, i + r/2), "lingua" pairs (2i, 2i + 1); "keep" does not change it. The model's results do not change.
        shard_bytes: largest size of a file in bytes.
        overrides: values that replace those of the config file.
        dtype: of the tensors; "auto" keeps the dtype of the checkpoint (bfloat16 for a quantized GGUF file).

    Returns:
        The destination.

    Raises:
        CheckpointError: the destination exists, the tensors do not fit, or the source has another format.
        ConfigError: `rope` or `dtype` has an unsupported value.
    """
    if rope not in ROPES:
        raise ConfigError(f"rope={rope!r}: must be one of {', '.join(ROPES)}")
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination}: exists already; give a new folder")
    checkpoint = open_checkpoint(source, overrides)
    is_gguf, is_canon = checkpoint.path.is_file(), checkpoint.architecture.name == "LlamaCanonForCausalLM"
    if not (is_gguf or is_canon or "rope_version" in checkpoint.values):
        raise CheckpointError(f"{checkpoint.path}: only GGUF files and LlamaCanon checkpoints are converted")
    if is_gguf and rope != "keep":
        raise ConfigError(f"rope={rope!r}: must be keep for a GGUF file")
    if checkpoint.quantization is not None:
        raise CheckpointError(f"{checkpoint.path}: quantised files are not converted")
    values = dict(checkpoint.values)
    current = values.get("rope_version", "huggingface")
    wanted = current if rope == "keep" else rope
    to = resolve_dtype(checkpoint, dtype)
    values |= {"dtype": str(to).removeprefix("torch.")} | ({} if is_gguf else {"rope_version": wanted})
    values.pop("torch_dtype", None)
    with new_folder(destination) as folder:
        with checkpoint.tensors.opened() as tensors:
            named = _tensors(checkpoint, tensors, None if wanted == current else wanted)
            keeps = dtype == "auto" and not is_gguf
            _write(
                folder, named if keeps else ((name, tensor.to(to)) for name, tensor in named), shard_bytes, destination
            )
        with writing(destination):
            (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
            for file in folder.glob("*.safetensors"):  # which the library makes private
                file.chmod((folder / "config.json").stat().st_mode)
        if is_gguf:
            with writing(destination):
                _write_tokenizer(checkpoint, folder)
        else:
            for pattern in _CARRIED:
                for file in checkpoint.path.glob(pattern):
                    copy_file(file, folder / file.name, checkpoint.path)
    return destination


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write tokenizer, chat templates and end tokens of a GGUF file as Hugging Face files."""
    loaded = load_tokenizer(checkpoint.path)
    if loaded is not None:
        loaded.tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **loaded.special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    templates = chat_templates_of(checkpoint.path)
    named = {"default": templates} if isinstance(templates, str) else templates or {}
    for name, text in named.items():
        file = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    ends = {key: checkpoint.values.get(key) for key in ("bos_token_id", "eos_token_id")}
    generation = {key: value for key, value in ends.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _tensors(checkpoint: Checkpoint, tensors: OpenTensors, reorder: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its Hugging Face name, with query and key channels in the order `reorder`."""
    config = checkpoint.read_config()
    model = checkpoint.allocate(config, LocalKit(device="meta"))
    old, new = targets(model, checkpoint.names), targets(model, checkpoint.architecture.checkpoint_names)
    check_names(checkpoint, model, old, tensors.names())
    for (source, target), name in zip(old.items(), new, strict=True):
        tensor = load_tensor(checkpoint, tensors, source, target)
        yield name, (_reorder(tensor, target, config, reorder) if reorder else tensor)


def _reorder(tensor: Tensor, target: Target, config: ModelConfig, to: str) -> Tensor:
    """Reorder the query and key channels of a tensor. Other tensors are returned unchanged."""
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


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int, destination: Path) -> None:
    """Write one safetensors file, or several with an index. At most the tensors of one file are in memory."""
    written: list[tuple[Path, list[str], int]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        file = folder / f"shard-{len(written)}.safetensors"
        with writing(destination, CheckpointError, SafetensorError):
            save_file(shard, file, metadata={"format": "pt"})
        written.append((file, list(shard), sum(tensor.nbytes for tensor in shard.values())))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
    flush()
    if len(written) == 1:
        with writing(destination):
            written[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (file, names, _) in enumerate(written, start=1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        file.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": sum(size for *_, size in written)}, "weight_map": weight_map}
    write_json(folder / INDEX, index)
