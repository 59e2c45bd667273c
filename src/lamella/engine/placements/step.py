"""Step feature that selects the mixers of each request by its placement."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lamella.config import Placement
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.features import Fields, StepFeature
from lamella.layers.decoder import LanguageModel
from lamella.layers.supernet.batches import GatheredPlacements, MaskedPlacements, MixerUnion, build_mixer_union
from lamella.layers.supernet.placing import activate, active_placement


class PlacementStep(StepFeature):
    """Activates the placement of a step, and divides steps whose requests have different placements.

    Form of an eager step: the placement of each request, or None if all requests have the same one, which becomes the
    active placement. Form of a graph: the union of the mixers that its requests need.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._active = active_placement(model)
        self._tables: Sequence[tuple[int, ...]] = ()  # mixer indices of each request of the latest graph step

    def use(self, placement: Placement) -> None:
        """Activate a placement."""
        activate(self._model, placement)
        self._active = placement

    def can_pad(self, form: Hashable) -> bool:
        """Return True for steps with one placement."""
        return form is None

    def form(self, chunks: Sequence[Scheduled], replay: bool) -> Hashable:
        """Return the placement of each request, None, or the union of mixers, see the class."""
        own = self._placements(chunks)
        if not replay:
            return own or None
        union, tables = build_mixer_union(frozenset(own or [self._active]))
        self._tables = [tables[placement] for placement in own]
        return union

    def fields(self, form: Hashable, requests: int) -> Fields:
        """Return the table that selects the mixer of each row of a graph."""
        return {"mixers": (np.int32, (form.num_tables, requests))} if isinstance(form, MixerUnion) else {}

    def fill(self, form: Hashable, arrays: Mapping[str, np.ndarray], chunks: Sequence[Scheduled]) -> None:
        """Write the table. Padding rows select the first mixer."""
        if self._tables and "mixers" in arrays:
            used, table = len(chunks), arrays["mixers"]
            table[:, :used], table[:, used:] = np.array(self._tables).T, 0

    def context(
        self, form: Hashable, tensors: Mapping[str, Tensor], chunks: Sequence[Scheduled] | None
    ) -> Mapping[str, Any]:
        """Return the division of the batch among mixers."""
        if isinstance(form, MixerUnion):
            return {"placements": MaskedPlacements(form, tensors["mixers"])}
        return {"placements": GatheredPlacements(form)} if isinstance(form, tuple) else {}

    def reset(self) -> None:
        """Activate the active placement again: an exception may have interrupted its activation."""
        activate(self._model, self._active)

    def _placements(self, chunks: Sequence[Scheduled]) -> tuple[Placement, ...]:
        """Return the placement of each request if they differ. If all are equal, activate it, and return ()."""
        own = [placement for chunk in chunks if (placement := chunk.request.variant.placement)]
        if not own:
            return ()
        if any(placement is not own[0] and placement != own[0] for placement in own):
            return tuple(chunk.request.variant.placement or self._active for chunk in chunks)
        if own[0] is not self._active and own[0] != self._active:
            activate(self._model, own[0])
        self._active = own[0]
        return ()
