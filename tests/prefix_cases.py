"""Requests, keys and a naive search, for tests of the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import strategies as st

from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.state.manager import StateManager
from lamella.state.prefix import Hit, root_key
from lamella.state.spec import PagedState

pytestmark = pytest.mark.unit

BLOCK = 4
ROOT = root_key("model", "cpu", None)
TOKEN_IDS = st.lists(st.integers(0, 1), max_size=14)


def group(window: int | None = None) -> PagedState:
    """Return a group with a window, or with a chunk size if the number is negative."""
    if window is not None and window < 0:
        return PagedState(1, 8, torch.float32, chunk=-window)
    return PagedState(1, 8, torch.float32, window=window)


def sees(spec: PagedState, position: int, other: int) -> bool:
    """Return True if a token at `position` sees the earlier token at `other`."""
    if spec.chunk is not None:
        return position // spec.chunk == other // spec.chunk
    return spec.window is None or position - other < spec.window


def make_request(name: str, prompt: Sequence[int], output: int = 1, root: bytes | None = ROOT) -> Request:
    return Request(name, list(prompt), SamplingParams(temperature=0), max_tokens=output, prefix_root=root)


def keys_of(token_ids: Sequence[int], root: bytes = ROOT) -> list[bytes]:
    return make_request("", token_ids, root=root).block_keys(BLOCK, len(token_ids))


def brute_force(state: StateManager, keys: Sequence[bytes]) -> Hit:
    """Return the hit by a naive search: all visible blocks are cached, and a snapshot if the model has slot state."""
    present = [[pool.find(key) is not None for key in keys] + [False] for pool in state.block_pools]
    if not present:  # without paged state, keys of computed prefixes are remembered
        seen_before = [key in state._seen for key in keys] + [False]
    known = max((each.index(False) * BLOCK for each in present or [seen_before]), default=0)
    for length in range(len(keys) * BLOCK, 0, -BLOCK):
        snapshot = state.slot_pool.find(keys[length // BLOCK - 1]) if state.has_slot_state else None
        if (snapshot is not None or not state.has_slot_state) and all(
            each[position // BLOCK]
            for spec, each in zip(state.groups, present, strict=True)
            for position in range(length)
            if sees(spec, length, position)
        ):
            return Hit(length, snapshot, known)
    return Hit(seen_length=known)


def bookkeeping(state: StateManager) -> str:
    """Return all bookkeeping of the manager and its pools, LRU order included."""
    pools = [vars(pool) for pool in (*state.block_pools, state.slot_pool)]
    return repr((pools, {str(id(request)): each for request, each in state.allocations.items()}, state._copies))
