"""What every engine is told when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lamella.layers.decoder import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to compute.

    Attributes:
        dtype, device: of weights and activations.
        attention: "eager" or "sdpa", for engines with a choice: the full forwards of `hf` and `reference`.
        batch_size: sequences at a time, for engines that batch.
        options: passed on to the engine, under its own names.
        candidate: a loaded model to use in the place of the checkpoint's, for the engine lamella.
    """

    dtype: torch.dtype
    device: torch.device
    attention: str = "eager"
    batch_size: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    candidate: LanguageModel | None = None
