"""Engines with a supernet: one placement and switches of it, or requests under two placements."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.timing import generate_seconds, timed
from hybrid_parts.engines import Measure, floors, start_lamella
from hybrid_parts.models import Values, placements, supernet
from hybrid_parts.sizes import Sizes
from hybrid_parts.workloads import decode_ms, prompts, workloads


def fixed_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Start a supernet under one placement; measure the workloads and switches of the placement."""
    from lamella import SamplingParams

    first, second = placements(sizes)
    llm = start_lamella(supernet(sizes), sizes, args, folder, placement=first)

    def switch(placement: list[str]) -> float:
        start = time.perf_counter()
        llm.set_placement(placement)
        synchronize(args)
        return round(time.perf_counter() - start, 4)

    def measure() -> Values:
        result = {**workloads(timed(llm, SamplingParams), sizes), **floors(llm, sizes)}
        order = {"first": second, "back": first, "again": second}
        return result | {f"switch_{name}_s": switch(placement) for name, placement in order.items()}

    return measure


def mixed_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Start a supernet; measure decodes with half of the requests under each of two placements."""
    from lamella import SamplingParams

    first, second = placements(sizes)
    options = {"placement": first, "mixed_placements": True}
    llm = start_lamella(supernet(sizes), sizes, args, folder, **options)
    half = sizes.most // 2

    def decode(*own: list[str] | None) -> float:
        def run(some: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
            params = [
                SamplingParams(max_tokens=length, temperature=0.6, ignore_eos=True, detokenize=False, placement=placed)
                for length, placed in zip(lengths, own, strict=True)
            ]
            return generate_seconds(llm, some, params)

        run(prompts(sizes.most, sizes.prompt, sizes), [2] * sizes.most)
        return decode_ms(run, sizes.most, sizes)

    def measure() -> Values:
        both = [first, second]
        result = {
            "first_ms": decode(*[None] * sizes.most),
            "mixed_ms": decode(*both * half),
            "second_ms": decode(*[second] * sizes.most),
            **mixed_floors(llm, both, sizes),
        }
        llm.engine.runner.drop_graphs()
        return result | {
            "mixed_without_graphs_ms": decode(*both * half),
            "second_without_graphs_ms": decode(*[second] * sizes.most),
        }

    return measure


def mixed_floors(llm: Any, both: Sequence[list[str]], sizes: Sizes) -> Values:
    """Return the cost card, and floors of a decode step of all requests in ms.

    The floors are of a step under each placement, and of a step with half of the requests under each.
    """
    from lamella.bench.card import CostCard, measure_bandwidth
    from lamella.config import read_placement
    from lamella.layers.supernet.placing import activate, active_placement, idle_parameters

    model, bandwidth = llm.engine.model, measure_bandwidth(llm.engine.device)
    before, context = active_placement(model), sizes.prompt + sizes.decode // 2
    cards, idle = [], []
    for placement in both:
        activate(model, read_placement(placement, model.config))
        cards.append(CostCard.from_model(model, bandwidth))
        idle.append({parameter: parameter.nbytes for parameter in idle_parameters(model)})
    activate(model, before)
    alone = [card.floor_seconds(sizes.most, context) for card in cards]
    more = sum(nbytes for parameter, nbytes in idle[0].items() if parameter not in idle[1])
    state = sum(card.decode_bytes(sizes.most, context) - card.step_bytes for card in cards) / 2
    together = (cards[0].step_bytes + more + state) / bandwidth
    names = ("floor_first_ms", "floor_second_ms", "floor_mixed_ms")
    times = (round(seconds * 1e3, 4) for seconds in (*alone, together))
    return {"card": cards[0].as_dict(), **dict(zip(names, times, strict=True))}


def synchronize(args: argparse.Namespace) -> None:
    """Wait for the GPU."""
    import torch

    if args.device != "cpu":
        torch.cuda.synchronize()
