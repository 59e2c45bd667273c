"""Memory planning: pools fill the budget, have no useless blocks, and raise if nothing fits."""

from __future__ import annotations

import pytest
import torch

from lamella.engine.memory import Capacity
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError
from lamella.state.memory import StateCost
from lamella.state.spec import PagedState

pytestmark = pytest.mark.unit

FULL = PagedState(1, 4, torch.float32)
WINDOW = PagedState(1, 4, torch.float32, window=8)
BLOCK = 4 * FULL.bytes_per_token  # of one layer, with block_size=4


def plan(layers, budget, max_model_len=64, **changes):
    fields = {"block_size": 4, "max_num_seqs": 2, "max_num_batched_tokens": 8, "enable_prefix_caching": False}
    options = EngineOptions(model="unused", **fields | changes)
    return dict(Capacity.plan(options, StateCost(layers, {}), max_model_len, budget).blocks)


def test_full_attention_blocks_are_limited_by_budget_and_use():
    assert plan({FULL: 2}, 10 * 2 * BLOCK) == {FULL: 10}
    assert plan({FULL: 2}, 10 * 2 * BLOCK + 1) == {FULL: 10}
    assert plan({FULL: 2}, 10 * 2 * BLOCK - 1) == {FULL: 9}
    assert plan({FULL: 2}, 1 << 30) == {FULL: 2 * 16}  # two requests of 64 tokens


def test_windowed_groups_get_their_reach_per_request():
    assert plan({WINDOW: 1}, 1 << 30) == {WINDOW: 2 * (2 + 2) + 2}
    assert plan({WINDOW: 1}, 1 << 30, max_model_len=8) == {WINDOW: 2 * 2}  # no more than whole requests fill
    assert plan({FULL: 1, WINDOW: 3}, (10 * 3 + 5) * BLOCK) == {FULL: 5, WINDOW: 10}


def test_spare_memory_goes_to_the_prefix_cache():
    assert plan({WINDOW: 1}, 20 * BLOCK, enable_prefix_caching=True) == {WINDOW: 20}
    assert plan({WINDOW: 1}, 20 * BLOCK - 1, enable_prefix_caching=True) == {WINDOW: 10}
    assert plan({FULL: 1}, 1 << 30, enable_prefix_caching=True) == {FULL: 2 * 2 * 16}


def test_num_blocks_bounds_every_group():
    assert plan({FULL: 1, WINDOW: 1}, 1, num_blocks=12) == {FULL: 12, WINDOW: 10}


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize(
    ("layers", "least"), [({WINDOW: 1}, 10), ({FULL: 1}, 1), ({FULL: 1, WINDOW: 1}, 11), ({FULL: 1, WINDOW: 2}, 21)]
)
def test_too_small_budget_raises(layers, least, prefixes):
    plan(layers, least * BLOCK, enable_prefix_caching=prefixes)
    with pytest.raises(ConfigError, match="max_num_seqs=2: the state of so many requests does not fit") as caught:
        plan(layers, least * BLOCK - 1, enable_prefix_caching=prefixes)
    assert "give fewer" in str(caught.value) and "\n" not in str(caught.value)
