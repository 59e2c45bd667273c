"""Layout of the slot state of a decoder layer in a block of vLLM's cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch

from lamella.config import ModelConfig
from lamella.layers.decoder import LanguageModel
from lamella.layers.holders import SlotHolder, state_holders
from lamella.layers.local_kit import LocalKit
from lamella.parallel.group import Group
from lamella.parallel.sharding import Share
from lamella.state.spec import SlotState

_CHOICE = ".mixer.mixers."  # in the prefix of a module of one mixer of a stochastic layer
_ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class StateLayout:
    """Shape of a block. All layers have the same one, so that vLLM puts them into one group with small pages.

    If all state is convolution windows in the model's dtype, a block is rows of channels. Speculation adds spare rows.
    Otherwise a block is bytes, and the state of each holder starts at an offset. The mixers of a stochastic layer share
    an offset, since only one of them computes a request.

    Attributes:
        shape: of a block, without spare rows.
        dtype: of a block.
        offsets: in bytes, by the prefix of the holder; None for rows of channels.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: Mapping[str, int] | None = None

    @classmethod
    @cache
    def from_model(cls, model: ModelConfig, share: Share, dtype: torch.dtype) -> StateLayout | None:
        """Return the layout on a rank; None if no layer keeps slot state."""
        layers = LanguageModel(model, LocalKit(dtype, "meta", Group(share)))
        holders = [holder for holder in state_holders(layers) if isinstance(holder, SlotHolder)]
        if not holders:
            return None
        specs = [holder.specs[0] for holder in holders]
        alone = len({decoder_layer(holder.prefix) for holder in holders}) == len(holders)
        plain = all(len(holder.specs) == 1 and len(holder.specs[0].shape) == 2 for holder in holders)
        if alone and plain and {spec.dtype for spec in specs} == {dtype}:
            rows, channels = (max(sizes) for sizes in zip(*(spec.shape for spec in specs), strict=True))
            return cls((rows, channels), dtype)
        offsets: dict[str, int] = {}
        most = 0
        for _, group in groupby(holders, key=lambda holder: decoder_layer(holder.prefix)):
            ours = sorted(group, key=lambda holder: _CHOICE in holder.prefix)  # modules outside the mixers first
            start = end = 0
            for holder in ours:
                offsets[holder.prefix] = start
                stop = start + sum(padded_bytes(spec) for spec in holder.specs)
                end = max(end, stop)
                start = start if _CHOICE in holder.prefix else stop
            most = max(most, end)
        return cls((most,), torch.uint8, offsets)

    def block(self, spare_rows: int) -> tuple[int, ...]:
        """Return the shape of a block with `spare_rows` more rows."""
        if not spare_rows:
            return self.shape
        assert self.offsets is None
        return (self.shape[0] + spare_rows, self.shape[1])


def padded_bytes(spec: SlotState) -> int:
    """Return the bytes that a state takes in a block, with padding."""
    return -(-spec.bytes_per_request // _ALIGNMENT) * _ALIGNMENT


def decoder_layer(prefix: str) -> str:
    """Return the path of the decoder layer that a module belongs to."""
    return ".".join(prefix.split(".")[:3])
