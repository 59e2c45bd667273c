"""The workloads `system` and `chat`, and their variants."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common.prompts import random_tokens
from prefix_parts.models import SHAPE

PRIMERS = 2  # requests that pass before `warm`

Tokens = list[int]
# Whether to use the cache, prompts that are sent together, tokens to generate -> `first`, seconds to each prompt's
# first token, `total`, seconds to the end of the last, `tokens`, and `hit`, prompt tokens that were not computed.
Run = Callable[[bool, Sequence[Tokens], int], dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """A way to run a workload.

    Attributes:
        name: in tables.
        cached: whether the prefix cache is used.
        shared: whether prompts share a prefix.
        primer: requests before those of `system`: "requests", "system" (the system prompt alone), or none.
    """

    name: str
    cached: bool
    shared: bool
    primer: str = ""


VARIANTS = (
    Variant("off", cached=False, shared=False),
    Variant("cold", cached=True, shared=False),
    Variant("warm", cached=True, shared=True, primer="requests"),
    Variant("primed", cached=True, shared=True, primer="system"),
)


@dataclass(frozen=True)
class Load:
    """Sizes of the workloads; lengths in tokens."""

    requests: int = 12
    system_len: int = 512
    user_len: int = 32
    conversations: int = 4
    turns: int = 4
    turn_len: int = 48
    output_len: int = 16
    vocab_size: int = SHAPE["vocab_size"]

    def system(self, run: Run, variant: Variant, together: bool) -> Iterator[dict[str, Any]]:
        """Run `system` and yield each answer. Between answers the caller may run another variant."""
        draw = self._draw(f"system {together} {variant.name}")
        system = draw(self.system_len)
        if variant.primer == "requests":
            for _ in range(PRIMERS):
                run(True, [system + draw(self.user_len)], self.output_len)
        elif variant.primer == "system":
            run(True, [system + draw(1)], 1)  # a prompt's last token is never read from the cache
        prompts = [
            (system if variant.shared else draw(self.system_len)) + draw(self.user_len) for _ in range(self.requests)
        ]
        for some in [prompts] if together else [[prompt] for prompt in prompts]:
            yield run(variant.cached, some, self.output_len)

    def chat(self, run: Run, variant: Variant) -> Iterator[dict[str, Any]]:
        """Run `chat` and yield each answer: the first turns of all conversations, then the second turns, and so on.

        Without a shared prefix, each prompt is new.
        """
        draw = self._draw(f"chat {variant.name}")
        histories: list[Tokens] = [[] for _ in range(self.conversations)]
        for _ in range(self.turns):
            for history in histories:
                history += draw(self.turn_len)
                answer = run(variant.cached, [history if variant.shared else draw(len(history))], self.output_len)
                history += answer["tokens"][0]
                yield answer

    def workloads(self) -> dict[str, tuple[Callable[[Run, Variant], Iterator[dict[str, Any]]], list[Variant]]]:
        """Return each workload with its variants, by name."""
        return {
            "system": (lambda run, variant: self.system(run, variant, together=False), list(VARIANTS)),
            "system-batch": (lambda run, variant: self.system(run, variant, together=True), list(VARIANTS)),
            "chat": (self.chat, [variant for variant in VARIANTS if variant.name != "primed"]),
        }

    def _draw(self, name: str) -> Callable[[int], Tokens]:
        rng = random.Random(name)
        return lambda count: random_tokens(rng, count, self.vocab_size)
