"""Read and switch the placement of a supernet: the active mixer of each layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lamella.config import Placement, PlacementLike, read_placement
from lamella.config.placement import chosen_mixer
from lamella.layers.decoder import LanguageModel
from lamella.layers.state_modules import PagedAttention, SlotStateModule, find_state_modules
from lamella.layers.supernet.stochastic import Stochastic


def stochastic_layers(model: LanguageModel) -> Iterator[tuple[int, Stochastic]]:
    """Yield the index and the `Stochastic` module of each layer that has several mixers."""
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.mixer, Stochastic):
            yield index, layer.mixer


def has_choice(model: LanguageModel) -> bool:
    """Return True if any layer has several mixers."""
    return any(True for _ in stochastic_layers(model))


def active_placement(model: LanguageModel) -> Placement:
    """Return the name of each layer's active mixer; None for a layer with one mixer."""
    active = {index: mixer.active for index, mixer in stochastic_layers(model)}
    return tuple(active.get(index) for index in range(len(model.model.layers)))


def activate(model: LanguageModel, placement: Placement) -> None:
    """Activate a placement that `read_placement` returned."""
    for index, mixer in stochastic_layers(model):
        mixer.active = chosen_mixer(placement, index)


def idle_mixers(model: LanguageModel, placement: Placement | None = None) -> Iterator[nn.Module]:
    """Yield the mixers that a placement does not use; by default the active placement."""
    placement = placement or active_placement(model)
    for index, stochastic in stochastic_layers(model):
        yield from (mixer for name, mixer in stochastic.mixers.items() if name != placement[index])


def idle_parameters(model: LanguageModel) -> Iterator[nn.Parameter]:
    """Yield the parameters of mixers that the active placement does not use."""
    return (parameter for mixer in idle_mixers(model) for parameter in mixer.parameters())


def find_active_state_modules(
    model: LanguageModel, placement: Placement | None = None
) -> list[PagedAttention | SlotStateModule]:
    """Return the state modules that a placement uses, in layer order; by default the active placement."""
    idle = {module for mixer in idle_mixers(model, placement) for module in mixer.modules()}
    return [state_module for state_module in find_state_modules(model) if state_module not in idle]


class SupernetModel(LanguageModel):
    """Language model whose layers may have several mixers."""

    @property
    def has_choice(self) -> bool:
        """True if any layer has several mixers."""
        return has_choice(self)

    @property
    def placement(self) -> Placement:
        """Name of each layer's active mixer; None for a layer with one mixer."""
        return active_placement(self)

    def set_placement(self, placement: PlacementLike | None) -> None:
        """Activate a placement. On an error the active placement does not change.

        Args:
            placement: see `lamella.config.read_placement`; None for the config's main mixers.

        Raises:
            ConfigError: the placement has a wrong name or length, or a layer has no such mixer.
        """
        activate(self, read_placement(placement, self.config))
