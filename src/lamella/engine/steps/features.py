"""Seam for features of a step: extra input arrays, and extra attributes of the batch that layers read."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from torch import Tensor

from lamella.engine.scheduler import Scheduled

V = TypeVar("V")

# Arrays of a step by name: dtype and shape.
Fields: TypeAlias = Mapping[str, tuple[type, tuple[int, ...]]]


class StepFeature:
    """Adds arrays to a step's inputs, and attributes to its `ForwardBatch`. The base class adds nothing.

    For each step the runner calls `form` once, then `fields`, `fill` and `context` with that form. The form must
    determine the feature's arrays and operations completely: CUDA graphs are stored by the forms of all features, and a
    graph is replayed for every step with equal forms.
    """

    def can_replay(self, chunks: Sequence[Scheduled]) -> bool:
        """Return True if a captured graph can compute this decode step."""
        return True

    def can_pad(self, form: Hashable) -> bool:
        """Return True if an eager step of this form may have padding rows."""
        return True

    def form(self, chunks: Sequence[Scheduled], replay: bool) -> Hashable:
        """Return the form of a step.

        Args:
            chunks: of the step; empty for a step without requests (warm-up).
            replay: True if a CUDA graph computes the step.
        """
        return None

    def fields(self, form: Hashable, requests: int) -> Fields:
        """Return dtype and shape of the arrays that a step of `requests` rows needs, padding rows included."""
        return {}

    def fill(self, form: Hashable, arrays: Mapping[str, np.ndarray], chunks: Sequence[Scheduled]) -> None:
        """Write the feature's arrays on the host. Rows after those of the chunks are padding."""

    def context(
        self, form: Hashable, tensors: Mapping[str, Tensor], chunks: Sequence[Scheduled] | None
    ) -> Mapping[str, Any]:
        """Return attributes of the step's `ForwardBatch`.

        Args:
            form: of the step.
            tensors: fields of the step on the device, see `Layout.fields`.
            chunks: of the step; None while a graph is captured.
        """
        return {}

    def reset(self) -> None:
        """Restore a consistent state after an exception in the middle of a step."""


class StepFeatures:
    """All features of an engine. Each method combines the results of the features' methods."""

    def __init__(self, features: Sequence[StepFeature] = ()) -> None:
        self._features = tuple(features)

    def can_replay(self, chunks: Sequence[Scheduled]) -> bool:
        """Return True if every feature can be replayed."""
        return all(feature.can_replay(chunks) for feature in self._features)

    def can_pad(self, forms: Forms) -> bool:
        """Return True if every feature accepts padding rows."""
        return all(feature.can_pad(form) for feature, form in zip(self._features, forms, strict=True))

    def forms(self, chunks: Sequence[Scheduled], replay: bool) -> Forms:
        """Return the form of each feature."""
        return tuple(feature.form(chunks, replay) for feature in self._features)

    def fields(self, forms: Forms, requests: int) -> Fields:
        """Return the arrays of all features."""
        return _joined(feature.fields(form, requests) for feature, form in zip(self._features, forms, strict=True))

    def fill(self, forms: Forms, arrays: Mapping[str, np.ndarray], chunks: Sequence[Scheduled]) -> None:
        """Write the arrays of all features."""
        for feature, form in zip(self._features, forms, strict=True):
            feature.fill(form, arrays, chunks)

    def context(
        self, forms: Forms, tensors: Mapping[str, Tensor], chunks: Sequence[Scheduled] | None
    ) -> Mapping[str, Any]:
        """Return the attributes of all features."""
        features = zip(self._features, forms, strict=True)
        return _joined(feature.context(form, tensors, chunks) for feature, form in features)

    def reset(self) -> None:
        """Reset every feature."""
        for feature in self._features:
            feature.reset()


def _joined(parts: Iterable[Mapping[str, V]]) -> dict[str, V]:
    """Join mappings.

    Raises:
        ValueError: two mappings have the same key: one feature would silently replace the other's array.
    """
    found: dict[str, V] = {}
    for part in parts:
        if not found.keys().isdisjoint(part):
            raise ValueError(
                f"two step features define {', '.join(sorted(found.keys() & part.keys()))}: rename one of them"
            )
        found.update(part)
    return found


Forms: TypeAlias = tuple[Hashable, ...]
NO_FEATURES = StepFeatures()
