# No postponed annotations here: torch.compile support reads those of `Stack.forward` to know which sizes vary.
"""One model class for every architecture: lamella's layers with vLLM around them."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_conv_copy_spec, get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsLoRA, SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from lamella.config import ModelConfig
from lamella.errors import ConfigError
from lamella.layers.decoder import DecoderLayer
from lamella.layers.norm import RMSNorm
from lamella.layers.rotary import Positions
from lamella.layers.supernet.stochastic import Stochastic
from lamella.models.registry import find_architecture
from lamella.parallel.sharding import Partition
from lamella.vllm_plugin import PREFIX, compat
from lamella.vllm_plugin.hf_config import read_model_config
from lamella.vllm_plugin.kit import VllmKit
from lamella.vllm_plugin.loading.weights import WeightFiller, untie_own_head
from lamella.vllm_plugin.state.layout import StateLayout


def model_config(vllm_config: VllmConfig, architecture: str) -> ModelConfig:
    """The layers of the model that vLLM was asked for."""
    model = vllm_config.model_config
    return read_model_config(model.hf_config, architecture, model.max_model_len)


@support_torch_compile
class Stack(nn.Module):
    """Embedding, this pipeline stage's layers and final norm; the parts of other stages are missing."""

    def __init__(
        self, *, vllm_config: VllmConfig, config: ModelConfig, names: Mapping[str, str], prefix: str = "model"
    ):
        super().__init__()
        kit, stage = VllmKit(vllm_config, config, names), get_pp_group()
        self.embed_tokens = PPMissingLayer()
        if stage.is_first_rank or (stage.is_last_rank and config.tie_word_embeddings):
            self.embed_tokens = kit.embedding(config.vocab_size, config.hidden_size, f"{prefix}.embed_tokens")

        def layer(prefix: str) -> DecoderLayer:
            index = int(prefix.rpartition(".")[2])
            return DecoderLayer(config.layers[index], kit, config.hidden_size, prefix)

        self.start_layer, self.end_layer, self.layers = make_layers(len(config.layers), layer, f"{prefix}.layers")
        self.norm = RMSNorm(config.hidden_size, config.norm.eps, kit.device) if stage.is_last_rank else PPMissingLayer()
        self.kit = kit

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            residual = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            hidden = torch.zeros_like(residual)
        else:
            assert intermediate_tensors is not None
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        at = Positions(positions)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(at, hidden, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        return self.norm(hidden, residual)[0]


class Model(nn.Module, SupportsPP, SupportsLoRA, SupportsQuant):
    """A model of `architecture`, whose layers keep keys and values only."""

    architecture: str
    hf_to_vllm_mapper: WeightsMapper
    packed_modules_mapping: dict[str, list[str]]
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}  # noqa: RUF012

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Self:
        """vLLM would give a quantisation's lists of modules our names, but not the patterns among them. Both keep the
        file's, by which the kit calls projections.
        """
        model = super().__new__(cls)
        model.quant_config = vllm_config.quant_config
        if model.quant_config is not None:
            outer = find_architecture(cls.architecture).outer_prefix
            model.quant_config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={outer: ""} if outer else {}))
            model.quant_config.packed_modules_mapping.update(cls.packed_modules_mapping)
        return model

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        assert not prefix, "a language model inside another model is not supported"
        self.vllm_config = vllm_config
        config = model_config(vllm_config, self.architecture)
        self.config = untie_own_head(config, vllm_config.model_config.model, self.architecture)
        names = find_architecture(self.architecture).checkpoint_names
        self.model = Stack(vllm_config=vllm_config, config=self.config, names=names, prefix="model")
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            tied = self.model.embed_tokens if self.config.tie_word_embeddings else None
            self.lm_head = self.model.kit.lm_head(self.config.vocab_size, self.config.hidden_size, tied, "lm_head")
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], self.config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters of this rank and stage; raises `CheckpointError` where tensors do not fit the model."""
        architecture = find_architecture(self.architecture)
        own_name, leftovers = architecture.own_name, architecture.leftovers
        filler = WeightFiller(self, architecture.checkpoint_names, own_name=own_name, leftovers=leftovers)
        return filler.fill(weights)

    @property
    def whole_config(self) -> ModelConfig:
        """Of all that the checkpoint holds, mixers that a placement leaves out included."""
        return read_model_config(self.vllm_config.model_config.hf_config, self.architecture, whole=True)

    @property
    def stochastic(self) -> dict[int, Stochastic]:
        """The layers of this stage that have a choice of mixers."""
        layers = enumerate(self.model.layers)
        return {index: layer.mixer for index, layer in layers if isinstance(getattr(layer, "mixer", None), Stochastic)}


class HybridModel(Model, HasInnerState, IsHybrid):
    """A model some of whose layers keep slot state as well."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return (cls._layout(vllm_config).block(compat.num_speculative_tokens(vllm_config)),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (cls._layout(vllm_config).dtype,)

    @classmethod
    def _layout(cls, vllm_config: VllmConfig) -> StateLayout:
        partition = Partition(0, vllm_config.parallel_config.tensor_parallel_size)
        config = model_config(vllm_config, cls.architecture)
        layout = StateLayout.from_model(config, partition, vllm_config.model_config.dtype)
        if layout is None:
            raise ConfigError(
                f"{cls.architecture}: no layer keeps slot state; its description must say has_slot_state=False"
            )
        return layout

    def get_mamba_state_copy_func(self) -> tuple[Any, ...]:
        """How a block's state becomes another block's: rows with their accepted drafts, or all bytes."""
        rows = self._layout(self.vllm_config).offsets is None
        return (get_conv_copy_spec if rows else get_temporal_copy_spec,)

    def get_mamba_state_copy_funcs(self, mamba_types: set[Any]) -> dict[Any, tuple[Any, ...]]:
        """The same in the form of vLLM 0.29 and later."""
        return dict.fromkeys(mamba_types, self.get_mamba_state_copy_func())


@cache
def model_class(name: str) -> type[Model]:
    """The class under which vLLM knows an architecture, by its name with or without the prefix."""
    architecture = find_architecture(name.removeprefix(PREFIX))
    base = HybridModel if architecture.has_slot_state else Model
    # From the file's names to ours, the longest first, as adapters name projections.
    renamed = sorted(((file, ours) for ours, file in architecture.checkpoint_names.items()), key=lambda p: -len(p[0]))
    contents = {
        "architecture": name.removeprefix(PREFIX),
        "hf_to_vllm_mapper": WeightsMapper(orig_to_new_substr={f".{file}.": f".{ours}." for file, ours in renamed}),
        "packed_modules_mapping": {name: list(parts) for name, parts in architecture.packed_modules.items()},
        "__module__": __name__,
        "__qualname__": name,
    }
    if base is HybridModel and compat.has_costly_runner_state():
        contents["get_model_state_cls"] = lambda model: compat.runner_state(model.vllm_config)
    return type(name, (base,), contents)


def __getattr__(name: str) -> type[Model]:
    """The classes by name, as vLLM's registry imports them."""
    if not name.startswith("_"):
        with suppress(ConfigError):
            return model_class(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
