"""Opening of checkpoints: a folder, a GGUF file, the bundled demo, or a Hub id; Hugging Face or lingua files."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lamella.checkpoint.file_kinds import is_present, read_json, why_no_weights
from lamella.checkpoint.gguf.config import read_values, tensor_names
from lamella.checkpoint.gguf.file import find_gguf, is_gguf, open_gguf
from lamella.checkpoint.lingua import LINGUA_NAMES, TIED_HEAD, find_lingua, read_params
from lamella.checkpoint.overrides import apply_overrides
from lamella.checkpoint.quantization import DequantizedTensors, Quantization
from lamella.checkpoint.tensors import OpenTensors, TensorSource, TorchFile, open_weights
from lamella.checkpoint.tokenizer_files import eos_of_tokenizer
from lamella.config import ModelConfig
from lamella.config.config_keys import IgnoredKeys
from lamella.config.hf_config import HFConfig
from lamella.errors import CheckpointError, LamellaError
from lamella.layers.kit import Kit
from lamella.models.architecture import Architecture
from lamella.models.base import CausalLM, model_class
from lamella.models.names import rename
from lamella.models.registry import find_architecture
from lamella.parallel.sharding import Split

logger = logging.getLogger("lamella")

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"  # `lamella.demo` itself must not be imported here


@dataclass(frozen=True)
class Checkpoint:
    """Model on disk.

    Attributes:
        path: folder, or GGUF file.
        config_file: config.json, lingua's params.json, or the GGUF file.
        architecture: description of the model's architecture.
        values: content of config.json; for other formats, the equivalent values.
        names: names in the files by parameter paths, see `Architecture.checkpoint_names`.
        tied_head: name of a redundant copy of a tied head in the files.
        tensors: source of the weights; dequantizes quantized ones.
        quantization: of the files; None if they are not quantized.
    """

    path: Path
    config_file: Path
    architecture: Architecture
    values: Mapping[str, Any]
    names: Mapping[str, str]
    tied_head: str
    tensors: TensorSource
    quantization: Quantization | None = None
    _ignored: IgnoredKeys = field(default_factory=IgnoredKeys, repr=False, compare=False)

    def read_config(self, max_length: int | None = None) -> ModelConfig:
        """Return the config of the model; `max_length` is the context length that an engine will use, in tokens."""
        config = self.architecture.read_config(self.hf_config(self.values, max_length))
        if config.tie_word_embeddings and self.has_own_head:
            return replace(config, tie_word_embeddings=False)
        return config

    def hf_config(self, values: Mapping[str, Any], max_length: int | None = None) -> HFConfig:
        """Return a reader of `values`, which replace those of the config file."""
        return HFConfig(values, str(self.config_file), max_length, self._list, self._ignored)

    def allocate(self, config: ModelConfig, kit: Kit) -> CausalLM:
        """Build a model of the checkpoint's architecture, with uninitialized parameters.

        Args:
            config: result of `read_config`, or a changed copy.
            kit: builds the components; a kit on the device "meta" allocates no memory.
        """
        try:
            return model_class(self.architecture).allocate(config, kit)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            if isinstance(error, LamellaError) or not (isinstance(error, MemoryError) or _NO_MEMORY.search(reason)):
                raise
            raise CheckpointError(
                f"{self.config_file}: a model of these sizes does not fit into this machine's memory ({reason[:120]}); "
                "check the sizes, or divide it with tensor_parallel_size"
            ) from error

    def _list(self) -> Collection[str] | None:
        """Return the names of the tensors; None if there are no readable files, for example with dummy weights."""
        try:
            with self.tensors.opened() as tensors:
                return frozenset(tensors.names()) or None
        except CheckpointError:
            return None  # loading reports the error

    @cached_property
    def has_own_head(self) -> bool:
        """True if the config ties the head to the embedding, but the files have a head with other values.

        The files' head is then used, as in transformers 5 and vLLM.
        """
        embedding, head = rename("model.embed_tokens.weight", self.names), rename("lm_head.weight", self.names)
        try:
            with self.tensors.opened() as tensors:
                if not {embedding, head} <= set(tensors.names()) or _is_same(tensors, embedding, head):
                    return False
        except CheckpointError:
            return False  # loading reports the error
        logger.warning(
            "%s: tie_word_embeddings=true, and %s differs from the embedding: the files' own head is used",
            self.path,
            head,
        )
        return True

    def eos_token_ids(self, config: ModelConfig, of_tokenizer: int | None = None) -> tuple[int, ...]:
        """Return the tokens that end a text: those of the config, of generation_config.json, and of the tokenizer.

        Args:
            config: of the model.
            of_tokenizer: end-of-text token of the tokenizer in use; None: that of the folder's tokenizer files.
        """
        file = self.path / "generation_config.json"
        extra = HFConfig(read_json(file), str(file)).token_ids("eos_token_id") if file.is_file() else ()
        named = (of_tokenizer,) if of_tokenizer is not None else eos_of_tokenizer(self.path)
        found = tuple(dict.fromkeys((*config.eos_token_ids, *extra, *named)))
        beyond = [token for token in found if token >= config.vocab_size]
        if beyond:
            logger.warning("%s: ids of an end of text beyond vocab_size=%d: %s", self.path, config.vocab_size, beyond)
        return tuple(token for token in found if token < config.vocab_size)


def open_checkpoint(
    model: str | Path, overrides: Mapping[str, Any] | None = None, revision: str | None = None
) -> Checkpoint:
    """Open a checkpoint. Only configs are read, no tensors.

    Args:
        model: folder, GGUF file, `demo`, or Hub id.
        overrides: values that replace those of the config file, see `EngineOptions.hf_overrides`.
        revision: branch, tag or commit of a Hub id.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: the files do not exist, or do not contain a model.
        ConfigError: the architecture is unknown.
    """
    path = find_folder(model, revision)
    overrides = overrides or {}
    gguf = path if path.is_file() else None if is_present(path / "config.json") else find_gguf(path)
    if gguf is not None:
        return _open_gguf(gguf, overrides)
    lingua = find_lingua(path)
    if lingua is not None and not any(path.glob("*.safetensors")):
        config_file = lingua / "params.json"
        sections = {key: overrides[key] for key in overrides.keys() & read_json(config_file).keys()}
        others = {key: value for key, value in overrides.items() if key not in sections}
        values = apply_overrides(read_params(config_file, sections), others)
        architecture = find_architecture(_architecture_name(values, config_file))
        file = TorchFile(lingua / "consolidated.pth")
        return Checkpoint(path, config_file, architecture, values, LINGUA_NAMES, TIED_HEAD, file)
    config_file = path / "config.json"
    if not is_present(config_file):
        raise CheckpointError(_why_no_config(path))
    values = apply_overrides(read_json(config_file), overrides)
    architecture = find_architecture(_architecture_name(values, config_file))
    names = architecture.checkpoint_names
    tensors = open_weights(path, architecture.own_name)
    quantization = Quantization.read(values, config_file)
    if quantization is not None:
        tensors = DequantizedTensors(tensors, quantization, path)
        values = {key: value for key, value in values.items() if key != "quantization_config"}
    return Checkpoint(path, config_file, architecture, values, names, "lm_head.weight", tensors, quantization)


def _open_gguf(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    file = open_gguf(path)
    values = apply_overrides(read_values(file), overrides)
    architecture = find_architecture(_architecture_name(values, path))
    file.use_names(tensor_names)
    return Checkpoint(path, path, architecture, values, architecture.checkpoint_names, "lm_head.weight", file)


def find_folder(model: str | Path, revision: str | None = None) -> Path:
    """Return the folder or GGUF file of a model or tokenizer; download it if `model` is a Hub id.

    Args:
        model: folder, GGUF file, `demo`, or Hub id.
        revision: branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: there is no such folder, and the Hub has no such repository.
    """
    if str(model) == DEMO:
        return DEMO_FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        _check_entries(path)
        return path
    if path.is_file():
        if path.suffix == ".gguf" or is_gguf(path):
            return path
        raise CheckpointError(f"{path}: no such folder, but a file: give the folder that holds it, {path.parent}")
    # A Hub id is NAME or OWNER/NAME; anything else is a path.
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise CheckpointError(f"{model}: no such folder")
    return _download(str(model), revision)


def _check_entries(folder: Path) -> None:
    """Refuse a folder with a pipe or a device under the name of a file that may be read: reading it may never end."""
    for pattern in (*_CONFIGS, "*.safetensors", "*.bin", "*.pth", "*.gguf", "*.jinja"):
        for entry in folder.glob(pattern):
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise CheckpointError(f"{entry}: not a file, but a pipe or a device: remove it, or download it again")


# What torch says about sizes that it cannot allocate or count.
_NO_MEMORY = re.compile(r"allocate|out of memory|overflow|too large|invalid size|exceed", re.IGNORECASE)
_CONFIGS = ("*.json", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "chat_template*")
_UNWANTED = ("original/*", "onnx/*", "*/onnx/*", "coreml/*", "*consolidated*.safetensors", "runs/*")


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(*patterns: str) -> Path:
        wanted = [*patterns, *(f"default/{pattern}" for pattern in patterns)]
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=list(_UNWANTED)))

    try:
        folder = snapshot(*_CONFIGS, "*.safetensors", "consolidated.pth")
        if not any(folder.glob("*.safetensors")) and find_lingua(folder) is None:
            folder = snapshot(*_CONFIGS, "pytorch_model*.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(f"{model}: no such folder, and not available from the Hub{at} ({reason})") from error
    return folder


def _why_no_config(path: Path) -> str:
    if is_present(path / "params.json"):
        if is_present(path / "consolidated.pth"):
            return f"{path}: neither config.json nor params.json with consolidated.pth is there"
        if any(path.glob("consolidated*")):
            return f"{path}: {why_no_weights(path)}"
        return f"{path}: params.json is there, and consolidated.pth is not: download it, or consolidate the step"
    why = why_no_weights(path)
    if why.startswith("no weights"):
        why = "give the folder of a model, or a Hub id"
    return f"{path}: neither config.json nor params.json with consolidated.pth is there; {why}"


def _is_same(tensors: OpenTensors, a: str, b: str, rows: int = 4096) -> bool:
    """Compare two matrices, some rows at a time."""
    shape = tensors.shape(a)
    if shape != tensors.shape(b) or not shape:
        return False
    for start in range(0, shape[0], rows):
        part = (Split(shape[0], ((start, min(start + rows, shape[0])),)),)
        first, second = tensors.load(a, part), tensors.load(b, part)
        if not torch.equal(first, second.to(first.dtype)):
            return False
    return True


def _architecture_name(values: Mapping[str, Any], file: Path) -> str:
    names = values.get("architectures") or [values.get("model_type")]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CheckpointError(
            f"{file}: architectures does not name one; name it: --hf-overrides "
            '\'{"architectures": ["LlamaForCausalLM"]}\''
        )
    return names[0]
