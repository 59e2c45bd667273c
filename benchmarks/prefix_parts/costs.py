"""Costs of the workloads: what a hit saves, and the least time to a first token at the measured speeds."""

from __future__ import annotations

from typing import Any

from common.roofline import measure_product_flops, read_cost_card
from prefix_parts.load import Load
from prefix_parts.models import SHAPE

BLOCK = 16  # tokens, lamella's default


def measure_rates(device: str) -> tuple[float, float]:
    """Measure and print memory bandwidth (bytes per second) and the speed of bf16 products (operations per second)."""
    import torch

    from lamella.bench.card import measure_bandwidth

    bandwidth = measure_bandwidth(torch.device(device))
    flops = measure_product_flops(512, SHAPE["hidden_size"], 2 * SHAPE["intermediate_size"], device)
    print(f"measured: reads {bandwidth / 1e9:.1f} GB/s, bf16 products {flops / 1e9:.0f} GFLOP/s")
    return bandwidth, flops


def costs(path: str, load: Load, rates: tuple[float, float]) -> dict[str, Any]:
    """Print and return the bytes of state, what hits save, and the least time to first tokens at these speeds.

    Args:
        path: the checkpoint.
        load: the workloads.
        rates: bandwidth and operations per second.
    """
    bandwidth, flops = rates
    card = read_cost_card(path, bandwidth)
    multiplied = card.parameters - SHAPE["vocab_size"] * SHAPE["hidden_size"]  # per prompt token; the head is for one

    def floor_ms(tokens: int) -> float:
        return max(2 * multiplied * tokens / flops, card.step_bytes / bandwidth) * 1e3

    prompt, saved = load.system_len + load.user_len, load.system_len // BLOCK * BLOCK
    block, snapshot = card.state.bytes_per_token * BLOCK, card.state.bytes_per_request
    print(f"  weights read by a step {card.step_bytes / 1e6:.0f} MB, {card.step_bytes / bandwidth * 1e3:.1f} ms")
    print(f"  a block of {BLOCK} tokens {block / 1e3:.0f} kB, a snapshot of slot state {snapshot / 1e3:.0f} kB")
    print(
        f"  system: a hit is {saved} of {prompt} prompt tokens, {2 * multiplied * saved / 1e9:.0f} GFLOP not computed, "
        f"{saved // BLOCK} blocks shared; least ttft {floor_ms(prompt):.0f} ms -> {floor_ms(prompt - saved):.0f} ms"
    )
    turn, answer = load.turn_len, load.output_len
    history = (load.turns - 1) * (turn + answer)
    known = max(0, history - 1) // BLOCK * BLOCK  # an answer's last token is nowhere computed
    print(
        f"  chat: the last turn hits {known} of {history + turn} prompt tokens; "
        f"least ttft {floor_ms(history + turn):.0f} ms -> {floor_ms(history + turn - known):.0f} ms"
    )
    return {
        **card.as_dict(),
        "gflops": round(flops / 1e9, 1),
        "block_bytes": block,
        "snapshot_bytes": snapshot,
        "system_hit_tokens": saved,
        "system_ttft_floor_ms": [round(floor_ms(prompt), 2), round(floor_ms(prompt - saved), 2)],
        "chat_last_turn_hit_tokens": known,
        "chat_last_turn_ttft_floor_ms": [
            round(floor_ms(history + turn), 2),
            round(floor_ms(history + turn - known), 2),
        ],
    }
