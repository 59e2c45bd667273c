"""What every architecture shares: building from a config, loading a checkpoint, initialising from nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lamella.config import ModelConfig, Placement
from lamella.config.hf_config import HFConfig
from lamella.errors import CheckpointError
from lamella.layers.decoder import LanguageModel
from lamella.layers.kit import Kit
from lamella.layers.linear import splits_of
from lamella.layers.local_kit import LocalKit
from lamella.models.weight_loaders import attach_weight_loaders, shard_ids
from lamella.parallel.sharding import Split, cut

if TYPE_CHECKING:
    from lamella.checkpoint.files import Checkpoint
    from lamella.vision.image_model import ImageModel


class CausalLM(LanguageModel):
    """Base of the architectures: a subclass reads its config file and names its checkpoint's tensors.

    Attributes:
        checkpoint_names: rewrites our parameter paths into the checkpoint's: each key is one or more path components of
            ours, each value what stands there in the file.
        packed_modules_mapping: which of the file's projections are one module here, in the form that LoRA and
            quantization tools know.
        packed_module_mapping: the same by the names in files, with the shard that a parameter's `weight_loader` takes.
        outer_prefix: stands before the names of a language model that is a part of a larger one.
        has_slot_state: False where no layer of any model of the architecture keeps more than keys and values.
    """

    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "mixer": "self_attn",
        "feed_forward": "mlp",
        "mixer_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    }
    packed_modules_mapping: ClassVar[Mapping[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    packed_module_mapping: ClassVar[Mapping[str, tuple[str, str | int]]] = shard_ids(packed_modules_mapping)

    outer_prefix: ClassVar[str] = ""
    has_slot_state: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, kit: Kit | None = None) -> None:
        """A model with random weights (linears and embeddings N(0, 0.02), convolutions as torch's, norms one)."""
        super().__init__(config, kit or LocalKit(torch.get_default_dtype()))
        attach_weight_loaders(self)
        initialize(self)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.packed_module_mapping = shard_ids(cls.packed_modules_mapping)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter by its path here, or by that of a checkpoint's names, as loading loops ask for it."""
        from lamella.checkpoint.names import rename

        own = target
        if target not in (paths := [path for path, _ in self.named_parameters(remove_duplicate=False)]):
            own = next((path for path in paths if rename(path, self.checkpoint_names) == target), target)
        return super().get_parameter(own)

    @classmethod
    def own_name(cls, name: str) -> str | None:
        """What a file's tensor `name` is called among the language model's own; None where it belongs to another part
        of a larger model, which is not read.
        """
        return name

    @classmethod
    def leftovers(cls, names: Collection[str], expected: Collection[str]) -> set[str]:
        """Return which of a file's surplus tensors the architecture's tools leave behind, so that they are not read.

        Args:
            names: tensors of the file that the model has no place for.
            expected: tensors that the model needs.
        """
        return set()

    @classmethod
    def read_config(cls, config: HFConfig) -> ModelConfig:
        """The architecture's `config.json` as layers."""
        raise NotImplementedError(f"{cls.__name__}.read_config")

    @classmethod
    def image_model(cls, checkpoint: Checkpoint, load_format: str = "auto") -> type[ImageModel] | None:
        """What loads the part of a checkpoint that reads images; None where there is none. No tensor is read.

        Raises `ConfigError` or `CheckpointError`.
        """
        return None

    @classmethod
    def with_placement(cls, values: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
        """The values of a supernet's `config.json` with this as its main placement."""
        raise NotImplementedError(f"{cls.__name__}.with_placement")

    @classmethod
    def allocate(cls, config: ModelConfig, kit: Kit) -> Self:
        """A model whose parameters are not initialised, for a loader to fill."""
        model = cls.__new__(cls)
        LanguageModel.__init__(model, config, kit)
        attach_weight_loaders(model)
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any, kit: Kit | None = None) -> Self:
        """A model with random weights from a Hugging Face config: a dict, or a `transformers` config object."""
        values = config if isinstance(config, Mapping) else config.to_dict()
        model = cls.allocate(cls.read_config(HFConfig(values)), kit or LocalKit(torch.get_default_dtype()))
        initialize(model)
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        hf_overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """The model in the checkpoint at `path`, a folder or a Hub id, whatever its format; "auto" keeps its dtype.

        `hf_overrides` stand in the place of the config file's values, see `EngineOptions.hf_overrides`.

        Raises `CheckpointError` when a tensor is missing, left over or of the wrong shape.
        """
        from lamella.checkpoint import load_model, open_checkpoint

        checkpoint = open_checkpoint(path, hf_overrides)
        model = load_model(checkpoint, dtype=dtype, device=device)
        if not isinstance(model, cls):
            raise CheckpointError(f"{checkpoint.path}: holds a {type(model).__name__}, not a {cls.__name__}")
        return model


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter at random, as the architectures' training code starts.

    The same for every dtype, and for every rank its part of the same model. A module whose parameters are not drawn
    from N(0, 0.02) says in its attribute `initial` between which bounds they lie.
    """
    for module in model.modules():
        ranges: Mapping[str, tuple[float, float]] = getattr(module, "initial", {})
        for name, parameter in module.named_parameters(recurse=False):
            splits = splits_of(module, name)
            low, high = ranges.get(name, (0.0, 0.0))
            if low < high:
                parameter.copy_(cut(_wide(parameter, splits).uniform_(low, high, generator=generator), splits))
            elif name in ranges or name == "bias":
                parameter.fill_(low)
            else:
                parameter.copy_(cut(_wide(parameter, splits).normal_(0.0, 0.02, generator=generator), splits))


def _wide(parameter: nn.Parameter, splits: Sequence[Split]) -> Tensor:
    """Room to draw in: a generator gives other numbers in other dtypes, for part of a tensor, and in another order."""
    shape = [*(split.full for split in splits), *parameter.shape[len(splits) :]]
    order = sorted(range(len(shape)), key=parameter.stride, reverse=True)
    room = torch.empty([shape[dim] for dim in order], dtype=torch.float32, device=parameter.device)
    return room.permute([order.index(dim) for dim in range(len(order))])
