"""Layout of the slot state of a decoder layer in a block of vLLM's cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch

from lamella.config import ModelConfig
from lamella.layers.decoder import LanguageModel
from lamella.layers.local_kit import LocalKit
from lamella.layers.state_modules import SlotStateModule, find_state_modules
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition
from lamella.state.spec import SlotState

_CHOICE = ".mixer.mixers."  # in the prefix of a module of one mixer of a stochastic layer
_ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class StateLayout:
    """Layout of a block. All layers use the same shape, so that vLLM puts them into one group with small blocks.

    If all state is convolution windows in the model's dtype, a block is rows of channels, and speculation adds spare
    rows. Otherwise a block is bytes, and the state of each module starts at an offset. The mixers of a stochastic layer
    share an offset, because only one of them computes a request.

    Attributes:
        shape: shape of a block without spare rows.
        dtype: dtype of a block.
        offsets: offsets in bytes by the prefix of the state module; None for rows of channels.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: Mapping[str, int] | None = None

    @classmethod
    @cache
    def from_model(cls, model: ModelConfig, partition: Partition, dtype: torch.dtype) -> StateLayout | None:
        """Return the layout on a rank; None if no layer has slot state."""
        layers = LanguageModel(model, LocalKit(dtype, "meta", Group(partition)))
        state_modules = [
            state_module for state_module in find_state_modules(layers) if isinstance(state_module, SlotStateModule)
        ]
        if not state_modules:
            return None
        specs = [state_module.specs[0] for state_module in state_modules]
        one_module_per_layer = len({decoder_layer(state_module.prefix) for state_module in state_modules}) == len(
            state_modules
        )
        only_windows = all(
            len(state_module.specs) == 1 and len(state_module.specs[0].shape) == 2 for state_module in state_modules
        )
        if one_module_per_layer and only_windows and {spec.dtype for spec in specs} == {dtype}:
            rows, channels = (max(sizes) for sizes in zip(*(spec.shape for spec in specs), strict=True))
            return cls((rows, channels), dtype)
        offsets: dict[str, int] = {}
        largest = 0
        for _, group in groupby(state_modules, key=lambda state_module: decoder_layer(state_module.prefix)):
            ordered = sorted(
                group, key=lambda state_module: _CHOICE in state_module.prefix
            )  # modules outside the mixers first
            start = end = 0
            for state_module in ordered:
                offsets[state_module.prefix] = start
                stop = start + sum(padded_bytes(spec) for spec in state_module.specs)
                end = max(end, stop)
                start = start if _CHOICE in state_module.prefix else stop
            largest = max(largest, end)
        return cls((largest,), torch.uint8, offsets)

    def block(self, spare_rows: int) -> tuple[int, ...]:
        """Return the shape of a block with `spare_rows` extra rows."""
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
