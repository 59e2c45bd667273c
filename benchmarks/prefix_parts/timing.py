"""Variants of the workloads, timed in turn."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.timing import SETTLE_SECONDS
from prefix_parts.checks import Chosen, Seen
from prefix_parts.engines import PrefixWorker
from prefix_parts.load import VARIANTS, Load

Key = tuple[str, str, str]  # workload, engine, variant


@dataclass
class Best:
    """Best times of one variant of a workload over the rounds, in seconds.

    Attributes:
        first: time to the first token of each request.
        total: time of each call.
        all_totals: the times of all calls, round after round.
        hit: prompt tokens that were not computed, in the last round.
    """

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    all_totals: list[float] = field(default_factory=list)
    hit: int = 0

    def add_round(self, answers: Sequence[dict[str, Any]]) -> None:
        """Add the answers of a round."""
        first = [seconds for answer in answers for seconds in answer["first"]]
        total = [answer["total"] for answer in answers]
        self.first = [min(pair) for pair in zip(self.first, first, strict=True)] if self.first else first
        self.total = [min(pair) for pair in zip(self.total, total, strict=True)] if self.total else total
        self.all_totals += total
        self.hit = sum(answer["hit"] for answer in answers)


def measure(workers: Sequence[PrefixWorker], load: Load, rounds: int, seen: Seen) -> dict[Key, Best]:
    """Run all workloads in rounds.

    Args:
        workers: the engines.
        load: the workloads.
        rounds: how often each variant runs.
        seen: gets some of the tokens that each engine chose, by engine and variant.

    Returns:
        The best times by workload, engine and variant.
    """
    best: dict[Key, Best] = {}
    for number in range(rounds):
        for (name, (session, variants)), each in itertools.product(load.workloads().items(), workers):
            time.sleep(SETTLE_SECONDS)
            each.reset()
            mine = [variant for variant in variants if ("on" if variant.cached else "off") in each.modes]
            runs = {variant.name: Chosen(each.run) for variant in mine}
            answers: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in mine}
            # The order of the variants changes with the round.
            order = mine if number % 2 == 0 else mine[::-1]
            turns = {variant.name: session(runs[variant.name], variant) for variant in order}
            while turns:
                for variant_name, turn in list(turns.items()):
                    answer = next(turn, None)
                    if answer is None:
                        del turns[variant_name]
                    else:
                        answers[variant_name].append(answer)
            for variant in mine:
                best.setdefault((name, each.engine, variant.name), Best()).add_round(answers[variant.name])
                if number == 0:
                    seen.setdefault(f"{each.engine} {variant.name}", []).extend(runs[variant.name].kept)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return best


def rows_of(model: str, best: dict[Key, Best], load: Load) -> list[dict[str, Any]]:
    """Return the figures of a model as rows of the table."""
    rows = []
    system = load.requests * (load.system_len + load.user_len)
    turn, answer = load.turn_len, load.output_len
    chat = load.conversations * sum(n * turn + (n - 1) * answer for n in range(1, load.turns + 1))
    for workload, engine, variant in sorted(best, key=_order):
        mine, off = best[workload, engine, variant], best[workload, engine, "off"]
        skip = load.conversations if workload == "chat" and load.turns > 1 else 0
        first, plain = mine.first[skip:], off.first[skip:]
        rows.append(
            {
                "model": model,
                "workload": workload,
                "engine": engine,
                "variant": variant,
                "ttft_ms": round(statistics.mean(first) * 1e3, 2),
                "ttft_p95_ms": round(_quantile(first, 0.95) * 1e3, 2),
                "total_s": round(sum(mine.total), 4),
                "hit_rate": round(mine.hit / (chat if workload == "chat" else system), 4),
                "ttft_gain": round(statistics.mean(plain) / statistics.mean(first), 3),
                "total_gain": round(sum(off.total) / sum(mine.total), 3),
                "pair_cost": round(_pair_cost(off, mine), 4),
            }
        )
    return rows


def _pair_cost(off: Best, mine: Best) -> float:
    """Return the median of the added time over all requests and rounds. lamella's pairs run one after the other."""
    return statistics.median(b / a - 1 for a, b in zip(off.all_totals, mine.all_totals, strict=True))


def _order(key: Key) -> tuple[int, int, int]:
    workload, engine, variant = key
    names = [each.name for each in VARIANTS]
    return list(Load().workloads()).index(workload), ("lamella", "vllm").index(engine), names.index(variant)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
