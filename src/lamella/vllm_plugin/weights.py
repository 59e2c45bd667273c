"""Filling vLLM's modules from a checkpoint: every tensor is used, every parameter filled, or the error says which."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from lamella.checkpoint.names import rename, targets
from lamella.distributed.sharding import cut
from lamella.errors import CheckpointError
from lamella.layers.decoder import LanguageModel
from lamella.layers.kit import LocalKit
from lamella.layers.linear import splits_of

logger = logging.getLogger("vllm.lamella")  # whose lines stand among vLLM's own


@dataclass(frozen=True)
class _Place:
    """Where one tensor of a file goes; `shard` is what vLLM calls it where a parameter holds several."""

    path: str
    parameter: nn.Parameter
    shard: str | int | None
    load: Callable[..., None]

    def fill(self, tensor: Tensor) -> None:
        self.load(self.parameter, tensor, *(() if self.shard is None else (self.shard,)))


class WeightFiller:
    """Loads what is this rank's and stage's of a checkpoint into a model of the plugin."""

    def __init__(self, model: Any, names: Mapping[str, str], tied_head: str = "lm_head.weight") -> None:
        """`names`: our parameter paths -> the file's, see `CausalLM.checkpoint_names`; `tied_head` is what a tied
        head's redundant copy is called."""
        self.model, self.names = model, names
        whole = LanguageModel(model.config, LocalKit(torch.float32, "meta"))
        self._expected = targets(whole, names)
        self._redundant = {tied_head} if model.config.tie_word_embeddings else set()
        self._quantised = model.vllm_config.quant_config is not None

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The paths of the parameters that were filled."""
        places = self._places()
        seen: set[str] = set()
        unexpected, filled = [], set()
        tied: dict[str, Tensor] = {}  # the embedding, and what the file has beside it for the head
        for name, tensor in weights:
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name in self._redundant:
                tied[name] = tensor
                continue
            if name in seen:
                raise CheckpointError(f"tensor {name} stands in the checkpoint twice")
            seen.add(name)
            target, place = self._expected.get(name), places.get(name)
            if self._redundant and target is not None and target.path == "model.embed_tokens.weight":
                tied[name] = tensor
            if target is None and not (self._quantised and place is not None):
                unexpected.append(name)
            elif target is not None and not self._quantised and tuple(tensor.shape) != target.shape:
                raise CheckpointError(f"tensor {name} has shape {tuple(tensor.shape)}, the config says {target.shape}")
            elif place is not None:
                place.fill(tensor)
                filled.add(place.path)
        missing = set(self._expected) - seen
        if self._quantised:  # what stands for a projection's weight is the method's own affair
            missing = {name for name in missing if name in places and places[name].shard is None}
        problems = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
        if any(problems.values()):
            listed = "; ".join(f"{kind}: {', '.join(some[:20])}" for kind, some in problems.items() if some)
            raise CheckpointError(f"tensors do not fit {type(self.model).__name__}; {listed}")
        self._compare(tied)
        return filled

    def _compare(self, tied: Mapping[str, Tensor]) -> None:
        """Say where a head's own copy of the embedding, which is not used, is none."""
        if len(tied) == 2 and not torch.equal(*tied.values()):
            (copy,) = tied.keys() & self._redundant
            logger.warning("%s differs from the embedding it is tied to, and is not used", copy)

    def _places(self) -> dict[str, _Place]:
        """Where the tensors go that this rank and stage wants, by their names in the file."""
        modules = dict(self.model.named_modules())
        found = {}
        for path, parameter in self.model.named_parameters():
            owner, _, leaf = path.rpartition(".")
            module = modules[owner]
            load = getattr(parameter, "weight_loader", None) or _loader(module, leaf)
            shards: Mapping[str, str | int] | None = getattr(module, "parts", None)
            if shards is None:
                found[rename(path, self.names)] = _Place(path, parameter, None, load)
                continue
            parent = owner.rpartition(".")[0]
            for part, shard in shards.items():
                found[rename(f"{parent}.{part}.{leaf}", self.names)] = _Place(path, parameter, shard, load)
        return found


def _loader(module: nn.Module, leaf: str) -> Callable[[nn.Parameter, Tensor], None]:
    """How a parameter of a module of ours takes its part of a tensor."""
    splits = splits_of(module, leaf)
    return lambda parameter, tensor: default_weight_loader(parameter, cut(tensor, splits))
