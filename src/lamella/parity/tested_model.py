"""Model under test: the checkpoint with all options that engines, reference and report need."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.file_kinds import read_json
from lamella.checkpoint.files import Checkpoint
from lamella.checkpoint.loader import match_tensors, resolve_dtype
from lamella.checkpoint.names import targets
from lamella.checkpoint.overrides import apply_overrides
from lamella.config import ModelConfig, PlacementLike, placed, read_placement
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import ConfigError
from lamella.files import write_json
from lamella.layers.local_kit import LocalKit
from lamella.models.base import CausalLM

_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelUnderTest:
    """Checkpoint with loading options.

    Attributes:
        name: the model as the user gave it.
        checkpoint: opened checkpoint; `overrides` have been applied to its values.
        load_format: "auto", or "dummy" for random weights instead of the checkpoint's.
        seed: seed of dummy weights.
        max_model_len: length for which a `dynamic` RoPE scaling is computed; None for the config's.
        placement: placement of a supernet; None for the main mixers.
        overrides: config values that the user replaced.
    """

    name: str
    checkpoint: Checkpoint
    load_format: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    placement: PlacementLike | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: str | Path,
        load_format: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        placement: PlacementLike | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> ModelUnderTest:
        """Open a checkpoint and read its config, but no weights.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            ConfigError: the config or an option is wrong.
        """
        overrides = _as_json(overrides)
        checkpoint = open_checkpoint(model, overrides)
        tested = cls(str(model), checkpoint, load_format, seed, max_model_len, placement, overrides)
        _ = tested.config
        return tested

    @cached_property
    def whole_config(self) -> ModelConfig:
        """Config of the whole checkpoint, with all mixers of a supernet."""
        return self.checkpoint.read_config(self.max_model_len)

    @cached_property
    def config(self) -> ModelConfig:
        """Config of the model that runs: a supernet is reduced to its placement."""
        whole = self.whole_config
        return placed(whole, read_placement(self.placement, whole))

    @cached_property
    def config_hash(self) -> str:
        """Hash of the config file's values; independent of their order."""
        return hashlib.sha256(json.dumps(self.checkpoint.values, sort_keys=True).encode()).hexdigest()[:12]

    @cached_property
    def folder(self) -> Path:
        """Folder from which other libraries read the model: the checkpoint's own if nothing is overridden.

        With overrides it is a temporary folder that exists as long as this object: links to the checkpoint's files and
        a config.json with the new values. Other libraries would merge the overrides by their own rules.

        Raises:
            ConfigError: overrides are given for a lingua checkpoint, which has no config.json to replace.
        """
        own, config_file = self.checkpoint.path, self.checkpoint.config_file
        if not self.overrides:
            return own
        if config_file.name != "config.json":
            raise ConfigError(
                f"{config_file}: other libraries cannot be given hf_overrides of it; write them into a new folder: "
                f"lamella convert {self.name} NEW_FOLDER --hf-overrides '{json.dumps(self.overrides)}'"
            )
        folder = Path(tempfile.mkdtemp(prefix="lamella-overridden-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for file in own.iterdir():
            if file.name != config_file.name:
                (folder / file.name).symlink_to(file.absolute())
        write_json(folder / config_file.name, apply_overrides(read_json(config_file), self.overrides))
        return folder

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of the checkpoint; None if it has none."""
        return Tokenizer.load(self.checkpoint.path)

    def dtype(self, requested: torch.dtype | str) -> torch.dtype:
        """Return the dtype for "auto" or a dtype name."""
        return resolve_dtype(self.checkpoint, requested)

    def load(self, dtype: torch.dtype, device: torch.device) -> CausalLM:
        """Load the engine's model and activate the placement."""
        model = load_model(self.checkpoint, dtype, device, self.load_format, self.max_model_len, self.seed)
        model.set_placement(self.placement)
        return model

    def skeleton(self) -> CausalLM:
        """Return the engine's model on the meta device, without weights."""
        return self.checkpoint.allocate(self.whole_config, LocalKit(torch.float32, "meta"))

    def weights(self, device: torch.device) -> dict[str, Tensor]:
        """Read the tensors of all active modules one by one, without the packing of the engine's loader.

        Args:
            device: device of the engine. Dummy weights are drawn there, because random numbers depend on the device.

        Returns:
            Tensors by lamella's parameter path, with merged projections as separate tensors.
        """
        if self.load_format == "dummy":
            model = self.load(torch.float32, device)
            return self._placed({path: t.parameter[t.start : t.stop] for path, t in targets(model, {}).items()})
        with self.checkpoint.tensors.opened() as tensors:
            found, _ = match_tensors(self.checkpoint, self.skeleton(), tensors)
            names = self._placed({target.path: name for name, target in found.items()})
            return {path: tensors.load(name) for path, name in names.items()}

    def _placed(self, by_path: dict[str, _T]) -> dict[str, _T]:
        """Return the items that belong to the active mixers, with the paths of a model without a choice of mixers."""
        active = {
            f"model.layers.{layer}.mixer.mixers.{name}.": f"model.layers.{layer}.mixer."
            for layer, name in enumerate(read_placement(self.placement, self.whole_config))
        }
        found = {}
        for path, item in by_path.items():
            beginning = next((old for old in active if path.startswith(old)), None)
            if beginning is not None:
                found[active[beginning] + path.removeprefix(beginning)] = item
            elif ".mixer.mixers." not in path:
                found[path] = item
        return found


def _as_json(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the overrides after a round trip through JSON, because reports and other libraries read them as JSON."""
    if not overrides:
        return {}
    try:
        copy: dict[str, Any] = json.loads(json.dumps(overrides))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"hf_overrides: must be a dict of values that JSON has ({error})") from error
    return copy
