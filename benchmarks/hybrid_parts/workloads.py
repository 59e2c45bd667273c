"""Decode and prefill workloads."""

from __future__ import annotations

from typing import Any

from common.prompts import random_prompts
from common.timing import Run
from hybrid_parts.sizes import Sizes


def prompts(count: int, length: int, sizes: Sizes) -> list[list[int]]:
    """Return random prompts, always the same for a count and a length."""
    return random_prompts(count * length, count, length, sizes.vocab)


def decode_ms(run: Run, batch: int, sizes: Sizes) -> float:
    """Return the time of a decode step with `batch` requests, in ms."""
    some = prompts(batch, sizes.prompt, sizes)
    long, short = (
        min(run(some, [count] * batch) for _ in range(sizes.rounds)) for count in (1 + sizes.decode, 1)
    )  # fmt: skip
    return round((long - short) / sizes.decode * 1e3, 4)


def workloads(run: Run, sizes: Sizes) -> dict[str, Any]:
    """Run all workloads and return the figures by name."""
    count, length = sizes.prefill
    some = prompts(count, length, sizes)
    seconds = min(run(some, [1] * count) for _ in range(sizes.rounds))
    decodes = {f"decode_b{batch}_ms": decode_ms(run, batch, sizes) for batch in sizes.batches}
    return {**decodes, "prefill_tok_s": round(count * length / seconds)}


def warm(run: Run, sizes: Sizes) -> None:
    """Run each workload once, so that everything is compiled and tuned."""
    for batch, length, new in ((*sizes.prefill, 1), *((batch, sizes.prompt, 4) for batch in sizes.batches)):
        run(prompts(batch, length, sizes), [new] * batch)
