# No postponed annotations here: vLLM's torch.compile support reads those of `Stack.forward` to find dynamic sizes.
"""vLLM model class for every architecture of lamella."""

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
    """Return the config of the model that vLLM loads."""
    model = vllm_config.model_config
    return read_model_config(model.hf_config, architecture, model.max_model_len)


@support_torch_compile
class Stack(nn.Module):
    """Embedding, layers and final norm of this pipeline stage; modules of other stages are `PPMissingLayer`."""

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
        """Return the hidden states (T, hidden_size); on earlier stages, `hidden_states` and `residual`."""
        if get_pp_group().is_first_rank:
            residual = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            hidden = torch.zeros_like(residual)
        else:
            assert intermediate_tensors is not None
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        shared_positions = Positions(positions)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(shared_positions, hidden, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        return self.norm(hidden, residual)[0]


class Model(nn.Module, SupportsPP, SupportsLoRA, SupportsQuant):
    """Model of `architecture` whose layers have paged state only."""

    architecture: str
    hf_to_vllm_mapper: WeightsMapper
    packed_modules_mapping: dict[str, list[str]]
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}  # noqa: RUF012

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Self:
        """Configure the quantization before `__init__`.

        vLLM would map the module lists of a quantization config to lamella's names, but not the patterns in them. Both
        keep the names of the file, which the kit uses for projections.
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
        """Return the embeddings (T, hidden_size) of ids (T,)."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor | IntermediateTensors:
        """Return the output of this pipeline stage; see `Stack.forward`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """Return the logits of hidden states; None on ranks that vLLM does not gather logits on."""
        return self.logits_processor(self.lm_head, hidden)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters of this rank and stage; return their paths.

        Raises:
            CheckpointError: the tensors do not fit the model.
        """
        architecture = find_architecture(self.architecture)
        own_name, leftovers = architecture.own_name, architecture.leftovers
        filler = WeightFiller(self, architecture.checkpoint_names, own_name=own_name, leftovers=leftovers)
        return filler.fill(weights)

    @property
    def whole_config(self) -> ModelConfig:
        """Config of the whole checkpoint, including mixers that the placement excludes."""
        return read_model_config(self.vllm_config.model_config.hf_config, self.architecture, whole=True)

    @property
    def stochastic(self) -> dict[int, Stochastic]:
        """Stochastic mixers of this stage's layers, by layer index."""
        layers = enumerate(self.model.layers)
        return {index: layer.mixer for index, layer in layers if isinstance(getattr(layer, "mixer", None), Stochastic)}


class HybridModel(Model, HasInnerState, IsHybrid):
    """Model with slot state in some layers."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Return the shape of a state block; called by vLLM."""
        return (cls._layout(vllm_config).block(compat.num_speculative_tokens(vllm_config)),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Return the dtype of a state block; called by vLLM."""
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
        """Return vLLM's function to copy a state block: rows up to the accepted drafts, or all bytes."""
        rows = self._layout(self.vllm_config).offsets is None
        return (get_conv_copy_spec if rows else get_temporal_copy_spec,)

    def get_mamba_state_copy_funcs(self, mamba_types: set[Any]) -> dict[Any, tuple[Any, ...]]:
        """Return the copy functions by state type, for vLLM 0.29 and later."""
        return dict.fromkeys(mamba_types, self.get_mamba_state_copy_func())


@cache
def model_class(name: str) -> type[Model]:
    """Return vLLM's model class of an architecture, by its name with or without the prefix."""
    architecture = find_architecture(name.removeprefix(PREFIX))
    base = HybridModel if architecture.has_slot_state else Model
    # Map the file's names, which LoRA adapters use, to lamella's. Longer names first.
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
    """Return a model class by name; vLLM's registry imports the classes by name."""
    if not name.startswith("_"):
        with suppress(ConfigError):
            return model_class(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
