"""Filling vLLM's modules from a checkpoint: every tensor is used, every parameter filled, or the error says which."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import PPMissingLayer

from lamella.checkpoint.files import open_checkpoint
from lamella.checkpoint.names import Target, separate_tensors, targets
from lamella.config import ModelConfig
from lamella.errors import CheckpointError, UserError
from lamella.layers.decoder import LanguageModel
from lamella.layers.local_kit import LocalKit
from lamella.models.names import rename
from lamella.parallel.sharding import shard_tensor
from lamella.vllm_plugin.experts import VllmExperts
from lamella.vllm_plugin.packed import Shard

logger = logging.getLogger("vllm.lamella")  # whose lines stand among vLLM's own

# Of quantised projections, what is not in every file: the order of inputs, and a bound that the config says.
_OPTIONAL = ("g_idx", "input_scale_ub")


@dataclass(frozen=True)
class _Place:
    """Where one tensor of a file goes.

    `stands_for` are the names of what it brings, where a file may hold that by other names as well; nothing where a
    file need not have it.
    """

    path: str
    fill: Callable[[Tensor], None]
    stands_for: tuple[str, ...]


def untie_own_head(config: ModelConfig, model: str, architecture: str) -> ModelConfig:
    """Return `config` untied if the files hold a head that differs from the embedding, as lamella's own engine does.

    Newer versions of vLLM do so themselves, for safetensors under the usual name. If the files cannot be looked at
    before the model is built (a Hub id, a quantization that only vLLM reads), `WeightFiller` refuses such a head.

    Args:
        config: of the model that is about to be built.
        model: vLLM's `model`, a folder or a Hub id.
        architecture: the name under which lamella knows the model.
    """
    if not config.tie_word_embeddings or not Path(model).is_dir():
        return config
    try:
        checkpoint = open_checkpoint(model, {"architectures": [architecture]})
    except UserError:
        return config  # loading says what is wrong, if anything is
    return replace(config, tie_word_embeddings=False) if checkpoint.has_own_head else config


class WeightFiller:
    """Loads what is this rank's and stage's of a checkpoint into a model of the plugin."""

    def __init__(
        self,
        model: Any,
        names: Mapping[str, str],
        tied_head: str = "lm_head.weight",
        own_name: Callable[[str], str | None] = str,
        leftovers: Callable[[Collection[str], Collection[str]], set[str]] = lambda names, expected: set(),
    ) -> None:
        """`names`: our parameter paths -> the file's, see `Architecture.checkpoint_names`; `tied_head` is what a
        tied head's redundant copy is called; `own_name` and `leftovers` as in `Architecture`.
        """
        self.model, self.names, self._own_name, self._leftovers = model, names, own_name, leftovers
        self._skeleton = LanguageModel(model.config, LocalKit(torch.float32, "meta"))
        self._expected = targets(self._skeleton, names)
        apart = {rename(part, names) for _, part, _ in separate_tensors(self._skeleton)}
        # Which of both a file has shows only when all of it was there.
        self._known = self._expected | targets(self._skeleton, names, apart)
        # Of mixers that the placement leaves out.
        whole = targets(LanguageModel(model.whole_config, LocalKit(torch.float32, "meta")), names)
        self._idle = whole.keys() - self._expected.keys()
        self._redundant = {tied_head} if model.config.tie_word_embeddings else set()
        self._quantised = model.vllm_config.quant_config is not None
        # What a quantised file has beside the weights, only their own stage knows.
        modules = model.named_modules()
        elsewhere = [path for path, module in modules if isinstance(module, PPMissingLayer)]
        self._elsewhere = tuple(f"{rename(path, names)}." for path in elsewhere)

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The paths of the parameters that were filled."""
        places = self._places()
        seen: set[str] = set()
        unexpected, filled, brought = [], set[str](), set[str]()
        tied: dict[str, Tensor] = {}  # the embedding, and what the file has beside it for the head
        unread = 0
        for full_name, tensor in weights:
            name = self._own_name(full_name)
            if name is None:
                unread += 1
                continue
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name in self._redundant:
                tied[name] = tensor
                continue
            if name in self._idle:
                unread += 1
                continue
            if name in seen:
                raise CheckpointError(f"tensor {name} stands in the checkpoint twice")
            seen.add(name)
            target, place = self._known.get(name), places.get(name)
            if self._redundant and target is not None and target.path == "model.embed_tokens.weight":
                tied[name] = tensor
            if target is None and not (self._quantised and (place or name.startswith(self._elsewhere))):
                unexpected.append(name)
            elif target is not None and not self._is_packed(tensor) and tuple(tensor.shape) != target.shape:
                raise CheckpointError(f"tensor {name} has shape {tuple(tensor.shape)}, the config says {target.shape}")
            elif place is not None:
                if not brought.isdisjoint(place.stands_for):
                    raise CheckpointError(f"tensor {name}: what it holds stands in the checkpoint twice")
                place.fill(tensor)
                filled.add(place.path)
                brought.update(place.stands_for)
        if self._quantised:  # what stands for a weight is the method's own affair: whatever it has must be there
            missing = {name for place in places.values() for name in place.stands_for} - brought
        else:
            expected = targets(self._skeleton, self.names, seen).keys()
            missing = expected - seen
            unexpected += (seen & self._known.keys()) - expected
        left = self._leftovers(unexpected, [*self._known, *self._idle])
        unread += len(left)
        problems = {"missing": sorted(missing), "unexpected": sorted(set(unexpected) - left)}
        if any(problems.values()):
            listed = "; ".join(f"{kind}: {', '.join(some[:20])}" for kind, some in problems.items() if some)
            raise CheckpointError(f"tensors do not fit {type(self.model).__name__}; {listed}")
        self._compare(tied)
        if unread:
            logger.info("%d tensors of other parts, or of mixers that the placement leaves out, are not used", unread)
        return filled

    def _is_packed(self, tensor: Tensor) -> bool:
        """Whether a tensor's shape is not that of the weights in it, but of bytes that hold several."""
        return self._quantised and tensor.dtype == torch.uint8

    def _compare(self, tied: Mapping[str, Tensor]) -> None:
        """Refuse a head of the file's own that a tied model does not compute with."""
        if len(tied) != 2:
            return
        (head,) = tied.keys() & self._redundant
        (embedding,) = tied.keys() - self._redundant
        if torch.equal(tied[head].to(tied[embedding].dtype), tied[embedding]):
            return
        if head != rename("lm_head.weight", self.names):  # lingua's copy, without which there would be no head
            logger.warning("%s differs from the embedding it is tied to, and is not used", head)
            return
        untied: dict[str, Any] = {"tie_word_embeddings": False}
        if isinstance(getattr(self.model.vllm_config.model_config.hf_config, "text_config", None), PretrainedConfig):
            untied["text_config"] = dict(untied)
        raise CheckpointError(
            f"tensor {head} differs from the embedding that tie_word_embeddings=true puts in its place; to use "
            f"the head of the file: --hf-overrides '{json.dumps(untied)}'"
        )

    def _places(self) -> dict[str, _Place]:
        """Where the tensors go that this rank and stage wants, by their names in the file."""
        modules, packed = dict(self.model.named_modules()), self.model.model.kit.packed
        experts = {path: module for path, module in modules.items() if isinstance(module, VllmExperts)}
        paths = {parameter: path for path, parameter in self.model.named_parameters()}
        found: dict[str, _Place] = {}

        def add(part: str, path: str, fill: Callable[[Tensor], None], *stands_for: str) -> None:
            names = tuple(rename(name, self.names) for name in stands_for)
            found[rename(part, self.names)] = _Place(path, fill, names)

        for part, target in targets(self.model, {}).items():
            if not _is_vllms(modules, packed, paths[target.parameter]):
                add(part, paths[target.parameter], _copy(target), part)
        for path, part, (place, splits) in separate_tensors(self.model):
            add(part, path, _copy(Target(place, part, splits)), part)
        for owner, module in experts.items():
            for tensor in module.tensors():
                stands_for = (f"{owner}.{name}" for name in tensor.stands_for)
                add(f"{owner}.{tensor.name}", f"{owner}.{tensor.parameter}", tensor.fill, *stands_for)
        for path, parameter in self.model.named_parameters():
            if not _is_vllms(modules, packed, path) or path.startswith(tuple(f"{owner}." for owner in experts)):
                continue
            owner, _, leaf = path.rpartition(".")
            projections = packed.get(modules[owner])
            load = getattr(parameter, "weight_loader", default_weight_loader)
            if isinstance(modules[owner], Attention):
                for name in _names_beside(owner.rsplit(".", 2)[0], leaf):
                    add(name, path, partial(load, parameter))
                continue
            optional = leaf.endswith(_OPTIONAL) or not parameter.numel()
            if projections is None:
                add(path, path, partial(load, parameter), *([] if optional else [path]))
                continue
            parent = owner.rpartition(".")[0]
            for part, pieces in projections.shards.items():
                if leaf == "bias" and part in projections.unbiased:
                    continue
                name = f"{parent}.{part}.{leaf}"
                add(name, path, partial(_load, load, parameter, pieces), *([] if optional else [name]))
        return found


def _names_beside(attention: str, leaf: str) -> tuple[str, ...]:
    """What is called how by those who write scales of queries, keys and values: no file need have any."""
    projection = f"{attention}.{leaf[0]}_proj"
    names = f"{attention}.{leaf}", f"{attention}.attn.{leaf}", f"{projection}.{leaf}"
    return (*names, f"{projection}.output_scale") if leaf.endswith("_scale") else names


def _is_vllms(modules: Mapping[str, nn.Module], packed: Collection[nn.Module], path: str) -> bool:
    """Return True if a parameter is of a module that loads in vLLM's way.

    Apart from those that the kit has packed, vLLM marks such parameters with a `weight_loader`.
    """
    owner, _, leaf = path.rpartition(".")
    module = modules[owner]
    return isinstance(module, Attention) or module in packed or hasattr(module.get_parameter(leaf), "weight_loader")


def _copy(target: Target) -> Callable[[Tensor], None]:
    """How a place of ours takes its part of a tensor."""

    def fill(tensor: Tensor) -> None:
        part = shard_tensor(tensor, target.splits)
        assert part.shape == target.destination.shape
        with torch.no_grad():
            target.destination.copy_(part)

    return fill


def _load(load: Callable[..., None], parameter: nn.Parameter, pieces: Sequence[Shard], tensor: Tensor) -> None:
    """The pieces of a tensor, each to where vLLM has it. (A scale of all of it has no rows.)"""
    for piece in pieces:
        load(parameter, tensor if len(pieces) == 1 else tensor[piece.start : piece.stop], piece.name)
