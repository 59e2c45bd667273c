"""The reference as an engine: our own oracle, which needs no other library."""

from __future__ import annotations

from lamella.parity.oracle import Oracle
from lamella.parity.scorers.full_forward import FullForward
from lamella.parity.scores import Settings
from lamella.parity.subject import Subject


def open_scorer(subject: Subject, settings: Settings) -> FullForward:
    oracle = Oracle(
        subject.config, subject.weights(settings.device), settings.dtype, settings.device, settings.attention
    )
    return FullForward("reference", oracle.logits)
