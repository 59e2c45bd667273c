"""Checks of the tokens: with the cache against without, and against one full forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.token_check import worst_gap
from prefix_parts.engines import start_lamella
from prefix_parts.load import Load, Run, Tokens

Seen = dict[str, list[tuple[Tokens, Tokens]]]  # by engine and variant: prompts and the tokens that were chosen


def check_tokens(path: str, device: str) -> dict[str, int]:
    """Check that every workload gives the same tokens with the cache as without, in float32.

    Returns:
        By workload and variant, how many prompt tokens were hits.
    """
    load = Load(requests=4, system_len=80, user_len=20, conversations=2, turns=3, turn_len=20, vocab_size=1000)
    run, reset = start_lamella(path, device, (False, True), "float32")

    def both(cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        answer, plain = run(cached, prompts, count), run(False, prompts, count)
        if answer["tokens"] != plain["tokens"]:
            raise AssertionError(f"{path}: other tokens with the prefix cache than without")
        return answer

    hits = {}
    for name, (session, variants) in load.workloads().items():
        reset()
        for variant in variants:
            hits[f"{name} {variant.name}"] = sum(answer["hit"] for answer in session(both, variant))
            assert variant.shared or not hits[f"{name} {variant.name}"], "prompts that share nothing hit"
    return hits


class Chosen:
    """A `Run` that records the first and the latest prompt, with the tokens that were chosen."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.kept: list[tuple[Tokens, Tokens]] = []

    def __call__(self, cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        """Run requests. See `Run`."""
        answer = self.run(cached, prompts, count)
        self.kept[1:] = [(list(prompts[-1]), answer["tokens"][-1])]
        return answer


def score(path: str, chosen: Seen) -> dict[str, float]:
    """Return the worst gap of log-probability between each engine's tokens and the best ones of a full fp32 forward."""
    import torch

    from lamella.checkpoint import load_model, open_checkpoint

    model = load_model(open_checkpoint(path), dtype="float32", device="cpu")
    gaps = {}
    for engine, pairs in chosen.items():
        gaps[engine] = 0.0
        for prompt, tokens in pairs:
            with torch.inference_mode():
                hidden = model(torch.tensor(prompt + tokens))[len(prompt) - 1 : -1]
                logits = model.compute_logits(hidden)
            gaps[engine] = max(gaps[engine], worst_gap(logits, tokens))
    return gaps
