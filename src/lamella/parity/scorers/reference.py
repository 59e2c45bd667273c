"""The reference as an engine: our own oracle, which needs no other library."""

from __future__ import annotations

from lamella.parity.reference_model import ReferenceModel
from lamella.parity.scorers.full_forward import FullForward
from lamella.parity.scores import Settings
from lamella.parity.tested_model import TestedModel


def open_scorer(tested: TestedModel, settings: Settings) -> FullForward:
    oracle = ReferenceModel(
        tested.config, tested.weights(settings.device), settings.dtype, settings.device, settings.attention
    )
    return FullForward("reference", oracle.logits)
