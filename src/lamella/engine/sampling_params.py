"""Former path of `lamella.engine.requests.sampling_params`, kept for importers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella._lazy import lazy_attributes

if TYPE_CHECKING:
    from lamella.engine.requests.sampling_params import SamplingParams as SamplingParams

__getattr__, __all__ = lazy_attributes(__name__, {"SamplingParams": "lamella.engine.requests.sampling_params"})
