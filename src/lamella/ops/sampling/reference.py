"""Replacement of placeholder tokens in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def placeholder_tokens(input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Return input_ids (T,) int64 with each -1 - r replaced by tokens[r] (R,) int64, or by 0 if that is negative."""
    return torch.where(input_ids < 0, tokens[(-1 - input_ids).clamp(min=0)].clamp(min=0), input_ids)
