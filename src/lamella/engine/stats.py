"""Statistics of a running engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamella.engine.engine import Engine


def usage(engine: Engine) -> dict[str, Any]:
    """Return counters and current usage of the scheduler, the pools and the prefix cache, see `LLM.stats`."""
    pools, slots, scheduler = engine.state.block_pools, engine.state.slot_pool, engine.scheduler
    capacity, free = sum(p.capacity for p in pools), sum(p.num_free for p in pools)
    started, cached = scheduler.num_started_tokens, scheduler.num_cached_tokens
    return {
        "graph_steps": engine.runner.num_replays,
        "preemptions": engine.scheduler.num_preemptions,
        "running": len(engine.scheduler.running),
        "waiting": len(engine.scheduler.waiting),
        "blocks": capacity,
        "blocks_used": capacity - free,
        "pages": capacity,  # former names of "blocks" and "blocks_used"
        "pages_used": capacity - free,
        "block_groups": [
            {
                "window": group.window,
                "chunk": group.chunk,
                "blocks": pool.capacity,
                "used": pool.num_referenced,
                "cached": pool.num_cached,
            }
            for group, pool in zip(engine.state.groups, pools, strict=True)
        ],
        "slots": engine.options.max_num_seqs,
        "slots_used": slots.num_referenced,
        "state_bytes": engine.memory.nbytes,
        **engine.variants.stats(),
        "prefix_hit_tokens": cached,
        "prefix_hit_rate": cached / started if engine.options.enable_prefix_caching and started else None,
        "prefix_cached_blocks": sum(pool.num_cached for pool in pools),
        "prefix_snapshots": slots.num_cached,
        "prefix_snapshot_bytes": slots.num_cached * engine.cost.bytes_per_request,
        "prefix_evictions": slots.num_evictions + sum(pool.num_evictions for pool in pools),
    }
