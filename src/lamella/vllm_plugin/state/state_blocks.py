"""Block manager of slot state in vLLM's scheduler.

Without prefix caching a request gets its state blocks once and keeps them. vLLM's manager recomputes this in every step
for every request, in about the same time as for the KV cache. This manager returns early.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from lamella.vllm_plugin import compat


class StateManager(MambaManager):
    """vLLM's manager with early returns. Further arguments are passed on, because they differ between versions."""

    def _has_all_blocks(self, request_id: str, num_tokens: int) -> bool:
        """Return True if the request has all blocks that it will ever need."""
        once = self.mamba_cache_mode == "none" and num_tokens <= self.block_size
        return once and bool(self.req_to_blocks.get(request_id))

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *more: Any, **options: Any) -> int:
        """Return the number of blocks that the request still needs; called by vLLM."""
        if self._has_all_blocks(request_id, num_tokens):
            return 0
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *more, **options)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *more: Any, **options: Any) -> list[Any]:
        """Allocate the blocks that the request still needs; called by vLLM."""
        if self._has_all_blocks(request_id, num_tokens):
            return []
        return super().allocate_new_blocks(request_id, num_tokens, *more, **options)

    def remove_skipped_blocks(self, *arguments: Any, **options: Any) -> None:
        """Free blocks of earlier states; called by vLLM."""
        if self.mamba_cache_mode != "none":  # otherwise there are no earlier states
            super().remove_skipped_blocks(*arguments, **options)


@dataclass(frozen=True)
class StateSpec(MambaSpec):
    """vLLM's spec of a layer's slot state; vLLM chooses the block manager by this class."""

    @classmethod
    def from_spec(cls, spec: KVCacheSpec | None) -> Self:
        """Convert a `MambaSpec`."""
        assert isinstance(spec, MambaSpec)
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)})


compat.register_state_spec(StateSpec, StateManager)
