"""The kit's own reference implementation as a scorer; it needs no other library."""

from __future__ import annotations

from lamella.parity.reference_model import ReferenceModel
from lamella.parity.scorers.full_forward import FullForward
from lamella.parity.scores import Settings
from lamella.parity.tested_model import ModelUnderTest


def open_scorer(tested: ModelUnderTest, settings: Settings) -> FullForward:
    """Open a scorer that computes with `ReferenceModel`."""
    model = ReferenceModel(
        tested.config, tested.weights(settings.device), settings.dtype, settings.device, settings.attention
    )
    return FullForward("reference", model.logits)
