"""Write a checkpoint as a Hugging Face folder: from GGUF or lingua files, or with the other order of RoPE channels."""

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
    """Write a GGUF file, or a LlamaCanon checkpoint, as a Hugging Face folder. The source is only read.

    Args:
        source: GGUF file of any architecture that GGUF is read for, or LlamaCanon checkpoint, lingua or Hugging Face.
        destination: new folder, which appears when it is complete.
        rope: for LlamaCanon, "huggingface" or "lingua" reorders the channels of queries and keys so that the file's
            rotation pairs become (i, i + r/2) or (2i, 2i + 1); the model computes the same.
        shard_bytes: largest size of a file.
        overrides: values that replace the config file's.
        dtype: of the tensors; "auto" keeps the checkpoint's (bfloat16 for a quantized GGUF file).

    Raises:
        CheckpointError: the destination exists, the tensors do not fit, or such a source is not converted.
        ConfigError: `rope` or `dtype` is none of the allowed values.
    """
    if rope not in ROPES:
        raise ConfigError(f"rope={rope!r}: must be one of {', '.join(ROPES)}")
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination}: is there already; nothing is overwritten")
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
            _write(folder, named if keeps else ((name, tensor.to(to)) for name, tensor in named), shard_bytes)
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
    """Write the tokenizer, chat templates and ends of a GGUF file in Hugging Face's files."""
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
    """Write one safetensors file, or several and an index; no more than one file's tensors are in memory."""
    written: list[tuple[Path, list[str], int]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        file = folder / f"shard-{len(written)}.safetensors"
        with writing(folder, CheckpointError, SafetensorError):
            save_file(shard, file, metadata={"format": "pt"})
        written.append((file, list(shard), sum(tensor.nbytes for tensor in shard.values())))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
    flush()
    if len(written) == 1:
        with writing(folder):
            written[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (file, names, _) in enumerate(written, start=1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        file.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": sum(size for *_, size in written)}, "weight_map": weight_map}
    write_json(folder / INDEX, index)
