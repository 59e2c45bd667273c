"""Finding a checkpoint: a folder, the bundled demo, or a Hub id; Hugging Face or lingua files."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.checkpoint.json_file import read_json
from lamella.checkpoint.lingua import LINGUA_NAMES, TIED_HEAD, find_lingua, read_params
from lamella.checkpoint.quantization import DequantizedTensors, Quantization
from lamella.checkpoint.tensors import SafetensorsFolder, TensorSource, TorchFile
from lamella.config import ModelConfig
from lamella.errors import CheckpointError
from lamella.models.hf_config import HFConfig
from lamella.models.registry import resolve_architecture

if TYPE_CHECKING:
    from lamella.models.base import CausalLM

logger = logging.getLogger("lamella")

DEMO = "demo"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: what it is, what its tensors are called, and where they come from."""

    path: Path
    config_file: Path
    architecture: type[CausalLM]
    values: Mapping[str, Any]  # of config.json, or what a lingua file says in the same words
    names: Mapping[str, str]  # our parameter paths -> the file's, see CausalLM.checkpoint_names
    tied_head: str  # what a tied head's redundant copy is called
    tensors: TensorSource
    quantization: Quantization | None = None  # of the files; what `tensors` gives is dequantised

    def read_config(self, max_length: int | None = None) -> ModelConfig:
        """The model that the values describe; `max_length` is the context that an engine will use."""
        return self.architecture.read_config(self.hf_config(self.values, max_length))

    def hf_config(self, values: Mapping[str, Any], max_length: int | None = None) -> HFConfig:
        """Values in the place of its own, to be read as these are."""
        return HFConfig(values, str(self.config_file), max_length, self._list)

    def _list(self) -> Collection[str] | None:
        """The names of the tensors; None where there are no files, as for dummy weights."""
        with self.tensors.opened() as tensors:
            return frozenset(tensors.names()) or None

    def eos_token_ids(self, config: ModelConfig) -> tuple[int, ...]:
        """Ids that end a text: the model's, and those of generation_config.json."""
        file = self.path / "generation_config.json"
        extra = HFConfig(read_json(file), str(file)).token_ids("eos_token_id") if file.is_file() else ()
        if not extra and config.eos_token_ids == self.architecture.unstated_eos:
            extra = self._tokenizers_eos()
        return tuple(dict.fromkeys((*config.eos_token_ids, *extra)))

    def _tokenizers_eos(self) -> tuple[int, ...]:
        """The end of text that the tokenizer's files name, where the config says what it says where nobody said
        anything."""
        file, vocabulary = self.path / "tokenizer_config.json", self.path / "tokenizer.json"
        token = read_json(file).get("eos_token") if file.is_file() and vocabulary.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            return ()
        from tokenizers import Tokenizer

        found = Tokenizer.from_file(str(vocabulary)).token_to_id(token)
        if found is None or found in self.architecture.unstated_eos:
            return ()
        logger.warning(
            "%s: texts end at the tokenizer's %r (%d) too: config.json has a default", self.path, token, found
        )
        return (found,)


def open_checkpoint(model: str | Path, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint at a path, the bundled `demo`, or a Hub id. Reads configs only, no tensor.

    `overrides` are values in the place of the config file's, see `EngineOptions.hf_overrides`.
    """
    path = _find(model)
    lingua = find_lingua(path)
    if lingua is not None and not any(path.glob("*.safetensors")):
        config_file = lingua / "params.json"
        values = _overridden(read_params(config_file), overrides or {})
        architecture = resolve_architecture(_architecture_name(values, config_file))
        file = TorchFile(lingua / "consolidated.pth")
        return Checkpoint(path, config_file, architecture, values, LINGUA_NAMES, TIED_HEAD, file)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{path}: neither config.json nor params.json with consolidated.pth is there")
    values = _overridden(read_json(config_file), overrides or {})
    architecture = resolve_architecture(_architecture_name(values, config_file))
    names = architecture.checkpoint_names
    tensors: TensorSource = SafetensorsFolder(path, architecture.own_name)
    quantization = Quantization.read(values, config_file)
    if quantization is not None:
        tensors = DequantizedTensors(tensors, quantization, path)
        values = {key: value for key, value in values.items() if key != "quantization_config"}
    return Checkpoint(path, config_file, architecture, values, names, "lm_head.weight", tensors, quantization)


def _find(model: str | Path) -> Path:
    if str(model) == DEMO:
        from lamella.demo import CHECKPOINT

        return CHECKPOINT
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    # A Hub id is NAME or OWNER/NAME; anything else was meant as a path.
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1 or path.exists():
        raise CheckpointError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "params.json", "consolidated.pth"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=[*patterns, *(f"default/{p}" for p in patterns)]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model}: no such folder, and not to be had from the Hub ({reason})") from error


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values with others in their place, and where both are mappings, with those inside."""
    changed = dict(overrides)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            changed[key] = _overridden(values[key], value)
    return {**values, **changed}


def _architecture_name(values: Mapping[str, Any], file: Path) -> str:
    names = values.get("architectures") or [values.get("model_type")]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CheckpointError(f"{file}: architectures does not name one")
    return names[0]
