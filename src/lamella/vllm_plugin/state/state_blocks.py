"""How vLLM's scheduler hands out the blocks of slot state.

Without prefix caching a request gets its blocks once and keeps them. vLLM's own manager finds that out in each step
for each request, in about the time that those of its keys and values take; ours looks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from lamella.vllm_plugin import compat


class StateManager(MambaManager):
    """vLLM's manager, but quick where nothing is to be done. Arguments are passed on: they differ among versions."""

    def _is_served(self, request_id: str, num_tokens: int) -> bool:
        """Whether the request has all blocks that it will ever have."""
        once = self.mamba_cache_mode == "none" and num_tokens <= self.block_size
        return once and bool(self.req_to_blocks.get(request_id))

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *more: Any, **options: Any) -> int:
        if self._is_served(request_id, num_tokens):
            return 0
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *more, **options)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *more: Any, **options: Any) -> list[Any]:
        if self._is_served(request_id, num_tokens):
            return []
        return super().allocate_new_blocks(request_id, num_tokens, *more, **options)

    def remove_skipped_blocks(self, *arguments: Any, **options: Any) -> None:
        if self.mamba_cache_mode != "none":  # else there are no earlier ones
            super().remove_skipped_blocks(*arguments, **options)


@dataclass(frozen=True)
class StateSpec(MambaSpec):
    """vLLM's description of a layer's state, by which it finds the manager."""

    @classmethod
    def of(cls, spec: KVCacheSpec | None) -> Self:
        assert isinstance(spec, MambaSpec)
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)})


compat.register_state_spec(StateSpec, StateManager)
