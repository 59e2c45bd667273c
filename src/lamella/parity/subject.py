"""The model under test, as a checkpoint: everything that the engines, the oracle and the report want to know of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.files import Checkpoint
from lamella.checkpoint.loader import resolve_dtype
from lamella.checkpoint.names import targets
from lamella.config import ModelConfig, PlacementLike, placed, read_placement
from lamella.engine.tokenizer import Tokenizer
from lamella.layers.kit import LocalKit
from lamella.models.base import CausalLM

_T = TypeVar("_T")


@dataclass(frozen=True)
class Subject:
    """A checkpoint and how to take it; `load_format="dummy"` fills it at random, by `seed`, instead of reading it, and
    of a supernet `placement` says which mixers compute.
    """

    name: str
    checkpoint: Checkpoint
    load_format: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    placement: PlacementLike | None = None

    @classmethod
    def open(
        cls,
        model: str | Path,
        load_format: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        placement: PlacementLike | None = None,
    ) -> Subject:
        """Reads the config only. Raises `CheckpointError` or `ConfigError`."""
        subject = cls(str(model), open_checkpoint(model), load_format, seed, max_model_len, placement)
        _ = subject.config
        return subject

    @cached_property
    def whole_config(self) -> ModelConfig:
        """Of all that the checkpoint holds."""
        return self.checkpoint.read_config(self.max_model_len)

    @cached_property
    def config(self) -> ModelConfig:
        """Of what is computed: a supernet's placement is a model without a choice."""
        whole = self.whole_config
        return placed(whole, read_placement(self.placement, whole))

    @cached_property
    def config_hash(self) -> str:
        """Of the config file's values, whatever their order."""
        return hashlib.sha256(json.dumps(self.checkpoint.values, sort_keys=True).encode()).hexdigest()[:12]

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.load(self.checkpoint.path)

    def dtype(self, asked: torch.dtype | str) -> torch.dtype:
        """The dtype that "auto" or a name means for this checkpoint."""
        return resolve_dtype(self.checkpoint, asked)

    def load(self, dtype: torch.dtype, device: torch.device) -> CausalLM:
        """The engine's model."""
        model = load_model(self.checkpoint, dtype, device, self.load_format, self.max_model_len, self.seed)
        model.set_placement(self.placement)
        return model

    def skeleton(self) -> CausalLM:
        """The engine's model without weights."""
        return self.checkpoint.architecture.allocate(self.whole_config, LocalKit(torch.float32, "meta"))

    def weights(self, device: torch.device) -> dict[str, Tensor]:
        """Every tensor that computes something, by our path, projections apart, read from the files one by one: nothing
        of the loader's packing is used. Dummy weights are nowhere but in a loaded model, and come out of one on the
        engine's `device`, which has random numbers of its own.
        """
        if self.load_format == "dummy":
            model = self.load(torch.float32, device)
            return self._placed({path: t.parameter[t.start : t.stop] for path, t in targets(model, {}).items()})
        with self.checkpoint.tensors.opened() as tensors:
            found = targets(self.skeleton(), self.checkpoint.names, tensors.names())
            names = self._placed({target.path: name for name, target in found.items()})
            return {path: tensors.load(name) for path, name in names.items()}

    def _placed(self, by_path: dict[str, _T]) -> dict[str, _T]:
        """What belongs to the model of `config`, by its own paths: the active mixer is the layer's mixer."""
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
