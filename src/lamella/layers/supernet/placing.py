"""The placement of a supernet: which mixer of each layer is active, and what the others hold."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lamella.config import Placement, PlacementLike, read_placement
from lamella.config.placement import chosen_mixer
from lamella.layers.decoder import LanguageModel
from lamella.layers.state_modules import PagedAttention, SlotStateModule, find_state_modules
from lamella.layers.supernet.stochastic import Stochastic


def choices(model: LanguageModel) -> Iterator[tuple[int, Stochastic]]:
    """Yield the layers that have several mixers: index and mixer module."""
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.mixer, Stochastic):
            yield index, layer.mixer


def has_choice(model: LanguageModel) -> bool:
    """Return True if any layer has several mixers."""
    return any(True for _ in choices(model))


def active_placement(model: LanguageModel) -> Placement:
    """Return the active mixer of each layer; None for a layer without a choice."""
    active = {index: mixer.active for index, mixer in choices(model)}
    return tuple(active.get(index) for index in range(len(model.model.layers)))


def activate(model: LanguageModel, placement: Placement) -> None:
    """Activate a placement that `read_placement` returned."""
    for index, mixer in choices(model):
        mixer.active = chosen_mixer(placement, index)


def idle_mixers(model: LanguageModel, placement: Placement | None = None) -> Iterator[nn.Module]:
    """Yield the mixers that compute nothing under a placement, by default the active one."""
    placement = placement or active_placement(model)
    for index, stochastic in choices(model):
        yield from (mixer for name, mixer in stochastic.mixers.items() if name != placement[index])


def idle_parameters(model: LanguageModel) -> Iterator[nn.Parameter]:
    """Yield the parameters that compute nothing under the active placement."""
    return (parameter for mixer in idle_mixers(model) for parameter in mixer.parameters())


def find_active_state_modules(
    model: LanguageModel, placement: Placement | None = None
) -> list[PagedAttention | SlotStateModule]:
    """Return the modules that keep state under a placement, by default the active one, in layer order."""
    idle = {module for mixer in idle_mixers(model, placement) for module in mixer.modules()}
    return [state_module for state_module in find_state_modules(model) if state_module not in idle]


class SupernetModel(LanguageModel):
    """A language model whose layers may have a choice of mixers."""

    @property
    def has_choice(self) -> bool:
        """True if any layer has several mixers."""
        return has_choice(self)

    @property
    def placement(self) -> Placement:
        """The active mixer of each layer; None for a layer without a choice."""
        return active_placement(self)

    def set_placement(self, placement: PlacementLike | None) -> None:
        """Activate a placement, see `read_placement`; all or nothing.

        Raises:
            ConfigError: a name is wrong, or a layer has no such mixer.
        """
        activate(self, read_placement(placement, self.config))
