"""Fill vLLM's modules from a checkpoint.

Every tensor must be used and every parameter filled; otherwise an error names the tensors.
"""

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

logger = logging.getLogger("vllm.lamella")  # a child of vLLM's logger, so that vLLM formats the lines

# Tensors of quantised projections that a file may lack: the order of inputs, and a bound that is in the config too.
_OPTIONAL = ("g_idx", "input_scale_ub")


@dataclass(frozen=True)
class _TensorTarget:
    """Destination of one tensor of a file.

    Attributes:
        path: path of the parameter that the tensor fills.
        fill: copies the tensor into the parameter.
        stands_for: names of the required tensors whose values it contains; empty if a file may lack the tensor.
    """

    path: str
    fill: Callable[[Tensor], None]
    stands_for: tuple[str, ...]


def untie_own_head(config: ModelConfig, model: str, architecture: str) -> ModelConfig:
    """Return `config` with an untied head if the files have a head that differs from the embedding.

    lamella's own engine does the same. Newer versions of vLLM do so too, for safetensors files under the usual name. If
    the files cannot be read before the model is built (a Hub id, or a quantization that only vLLM reads),
    `WeightFiller` refuses such a head.

    Args:
        config: config of the model that is about to be built.
        model: vLLM's `model`: a folder or a Hub id.
        architecture: lamella's name of the architecture.
    """
    if not config.tie_word_embeddings or not Path(model).is_dir():
        return config
    try:
        checkpoint = open_checkpoint(model, {"architectures": [architecture]})
    except UserError:
        return config  # if the checkpoint is wrong, loading reports it
    return replace(config, tie_word_embeddings=False) if checkpoint.has_own_head else config


class WeightFiller:
    """Load the shards of this rank and pipeline stage from a checkpoint into a model of the plugin."""

    def __init__(
        self,
        model: Any,
        names: Mapping[str, str],
        tied_head: str = "lm_head.weight",
        own_name: Callable[[str], str | None] = str,
        leftovers: Callable[[Collection[str], Collection[str]], set[str]] = lambda names, expected: set(),
    ) -> None:
        """Collect the expected tensors.

        Args:
            model: `lamella.vllm_plugin.model.Model`.
            names: checkpoint names by lamella's names, see `Architecture.checkpoint_names`.
            tied_head: name of the redundant copy of a tied head in the file.
            own_name: see `Architecture.own_name`.
            leftovers: see `Architecture.leftovers`.
        """
        self.model, self.names, self._own_name, self._leftovers = model, names, own_name, leftovers
        self._skeleton = LanguageModel(model.config, LocalKit(torch.float32, "meta"))
        self._expected = targets(self._skeleton, names)
        separate = {rename(part, names) for _, part, _ in separate_tensors(self._skeleton)}
        # A file has either joint or separate tensors. Which of them is known only after all names have been seen.
        self._known = self._expected | targets(self._skeleton, names, separate)
        # Tensors of mixers that the placement excludes.
        whole = targets(LanguageModel(model.whole_config, LocalKit(torch.float32, "meta")), names)
        self._idle = whole.keys() - self._expected.keys()
        self._redundant = {tied_head} if model.config.tie_word_embeddings else set()
        self._quantised = model.vllm_config.quant_config is not None
        # Extra tensors of a quantised file, such as scales, are known only to the stage that has the module.
        modules = model.named_modules()
        other_stages = [path for path, module in modules if isinstance(module, PPMissingLayer)]
        self._other_stages = tuple(f"{rename(path, names)}." for path in other_stages)

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters.

        Args:
            weights: names and tensors of the checkpoint.

        Returns:
            The paths of the filled parameters.

        Raises:
            CheckpointError: tensors are missing, unexpected, duplicate, or have another shape.
        """
        destinations = self._find_targets()
        seen: set[str] = set()
        unexpected, filled, loaded = [], set[str](), set[str]()
        tied: dict[str, Tensor] = {}  # the embedding, and the file's own tensor for the head
        num_unused = 0
        for full_name, tensor in weights:
            name = self._own_name(full_name)
            if name is None:
                num_unused += 1
                continue
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name in self._redundant:
                tied[name] = tensor
                continue
            if name in self._idle:
                num_unused += 1
                continue
            if name in seen:
                raise CheckpointError(f"tensor {name} stands in the checkpoint twice")
            seen.add(name)
            target, destination = self._known.get(name), destinations.get(name)
            if self._redundant and target is not None and target.path == "model.embed_tokens.weight":
                tied[name] = tensor
            if target is None and not (self._quantised and (destination or name.startswith(self._other_stages))):
                unexpected.append(name)
            elif target is not None and not self._is_packed(tensor) and tuple(tensor.shape) != target.shape:
                raise CheckpointError(f"tensor {name} has shape {tuple(tensor.shape)}, the config says {target.shape}")
            elif destination is not None:
                if not loaded.isdisjoint(destination.stands_for):
                    raise CheckpointError(f"tensor {name}: what it holds stands in the checkpoint twice")
                destination.fill(tensor)
                filled.add(destination.path)
                loaded.update(destination.stands_for)
        if self._quantised:  # the quantization method decides which tensors there are; all of them must be loaded
            missing = {name for destination in destinations.values() for name in destination.stands_for} - loaded
        else:
            expected = targets(self._skeleton, self.names, seen).keys()
            missing = expected - seen
            unexpected += (seen & self._known.keys()) - expected
        leftover = self._leftovers(unexpected, [*self._known, *self._idle])
        num_unused += len(leftover)
        problems = {"missing": sorted(missing), "unexpected": sorted(set(unexpected) - leftover)}
        if any(problems.values()):
            listed = "; ".join(f"{kind}: {', '.join(some[:20])}" for kind, some in problems.items() if some)
            raise CheckpointError(f"tensors do not fit {type(self.model).__name__}; {listed}")
        self._check_tied_head(tied)
        if num_unused:
            logger.info("%d tensors of other model parts, or of mixers outside the placement, are not used", num_unused)
        return filled

    def _is_packed(self, tensor: Tensor) -> bool:
        """Return True if the tensor packs several weights into a byte, so that its shape differs from the weight's."""
        return self._quantised and tensor.dtype == torch.uint8

    def _check_tied_head(self, tied: Mapping[str, Tensor]) -> None:
        """Check the file's own head of a tied model.

        Raises:
            CheckpointError: the head differs from the embedding that the model would use instead.
        """
        if len(tied) != 2:
            return
        (head,) = tied.keys() & self._redundant
        (embedding,) = tied.keys() - self._redundant
        if torch.equal(tied[head].to(tied[embedding].dtype), tied[embedding]):
            return
        if head != rename("lm_head.weight", self.names):  # lingua files always have this copy
            logger.warning("%s differs from the embedding it is tied to, and is not used", head)
            return
        untied: dict[str, Any] = {"tie_word_embeddings": False}
        if isinstance(getattr(self.model.vllm_config.model_config.hf_config, "text_config", None), PretrainedConfig):
            untied["text_config"] = dict(untied)
        raise CheckpointError(
            f"tensor {head} differs from the embedding that tie_word_embeddings=true puts in its place; to use "
            f"the head of the file: --hf-overrides '{json.dumps(untied)}'"
        )

    def _find_targets(self) -> dict[str, _TensorTarget]:
        """Return the destinations of the tensors that this rank and stage need, by their names in the file."""
        modules, packed = dict(self.model.named_modules()), self.model.model.kit.packed
        experts = {path: module for path, module in modules.items() if isinstance(module, VllmExperts)}
        paths = {parameter: path for path, parameter in self.model.named_parameters()}
        found: dict[str, _TensorTarget] = {}

        def add(part: str, path: str, fill: Callable[[Tensor], None], *stands_for: str) -> None:
            names = tuple(rename(name, self.names) for name in stands_for)
            found[rename(part, self.names)] = _TensorTarget(path, fill, names)

        for part, target in targets(self.model, {}).items():
            if not _loads_by_vllm(modules, packed, paths[target.parameter]):
                add(part, paths[target.parameter], _copy(target), part)
        for path, part, (part_target, splits) in separate_tensors(self.model):
            add(part, path, _copy(Target(part_target, part, splits)), part)
        for owner, module in experts.items():
            for tensor in module.tensors():
                stands_for = (f"{owner}.{name}" for name in tensor.stands_for)
                add(f"{owner}.{tensor.name}", f"{owner}.{tensor.parameter}", tensor.fill, *stands_for)
        for path, parameter in self.model.named_parameters():
            if not _loads_by_vllm(modules, packed, path) or path.startswith(tuple(f"{owner}." for owner in experts)):
                continue
            owner, _, leaf = path.rpartition(".")
            projections = packed.get(modules[owner])
            load = getattr(parameter, "weight_loader", default_weight_loader)
            if isinstance(modules[owner], Attention):
                for name in _scale_names(owner.rsplit(".", 2)[0], leaf):
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


def _scale_names(attention: str, leaf: str) -> tuple[str, ...]:
    """Return the names under which different tools store a scale of queries, keys or values; all are optional."""
    projection = f"{attention}.{leaf[0]}_proj"
    names = f"{attention}.{leaf}", f"{attention}.attn.{leaf}", f"{projection}.{leaf}"
    return (*names, f"{projection}.output_scale") if leaf.endswith("_scale") else names


def _loads_by_vllm(modules: Mapping[str, nn.Module], packed: Collection[nn.Module], path: str) -> bool:
    """Return True if vLLM loads a parameter: it is packed by the kit, part of attention, or has a `weight_loader`."""
    owner, _, leaf = path.rpartition(".")
    module = modules[owner]
    return isinstance(module, Attention) or module in packed or hasattr(module.get_parameter(leaf), "weight_loader")


def _copy(target: Target) -> Callable[[Tensor], None]:
    """Return a function that copies this rank's shard of a tensor to `target`."""

    def fill(tensor: Tensor) -> None:
        part = shard_tensor(tensor, target.splits)
        assert part.shape == target.destination.shape
        with torch.no_grad():
            target.destination.copy_(part)

    return fill


def _load(load: Callable[..., None], parameter: nn.Parameter, pieces: Sequence[Shard], tensor: Tensor) -> None:
    """Load the pieces of a tensor into vLLM's packed parameter. A single piece may be a scale without rows."""
    for piece in pieces:
        load(parameter, tensor if len(pieces) == 1 else tensor[piece.start : piece.stop], piece.name)
