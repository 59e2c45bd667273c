"""Laboratory of the path matrix: a loaded model and a sequence, with engines built as each path needs them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lamella.engine.engine import Engine
from lamella.engine.loading import load_engine
from lamella.engine.options import EngineOptions
from lamella.layers.decoder import LanguageModel
from lamella.layers.supernet.placing import find_active_state_modules
from lamella.parity.forcing import ForcedEngine, Record
from lamella.parity.routing import PinnedRouting
from lamella.parity.sequences import TokenSequence, split
from lamella.state.memory import StateCost

BLOCK_SIZE = 16
SMALL_BLOCK = 4  # for paths that need blocks much shorter than the sequence


class NotExercised(Exception):
    """The engine did not do what the path is meant to test."""


class Laboratory:
    """Loaded model and sequence, with factories for engines and other requests."""

    def __init__(
        self,
        model: LanguageModel,
        device: torch.device,
        token_ids: Sequence[int],
        seed: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the model and the sequence.

        Args:
            model: loaded model.
            device: device of the model.
            token_ids: the sequence under test.
            seed: seed of the other requests' tokens.
            options: engine options that load the same model, for paths that start another process.
        """
        self.model, self.device, self.token_ids = model, device, tuple(token_ids)
        self.options = options or {}
        self.routing = PinnedRouting(model, token_ids[:-1])  # the last token is only predicted
        self._random = random.Random(f"strangers {seed}")  # differs from the tested sequence, which may use `seed`

    def engine(self, padding_rows: int = 0, **options: Any) -> ForcedEngine:
        """Return a new engine over the model; decode steps get `padding_rows` padding rows."""
        usual = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 4096,
            "block_size": BLOCK_SIZE,
            "num_blocks": 1024,
            "enforce_eager": True,
        }
        return ForcedEngine(self.model, usual | options, self.device, padding_rows=padding_rows)

    def sharded(self, size: int) -> Engine:
        """Return an engine with `size` tensor-parallel ranks."""
        usual = {"max_num_seqs": 1, "block_size": BLOCK_SIZE, "num_blocks": 1024, "enforce_eager": True}
        chunk = len(self.token_ids) * 2 // 3  # two chunks
        return load_engine(
            EngineOptions(**{**usual, **self.options}, max_num_batched_tokens=chunk, tensor_parallel_size=size)
        )

    @property
    def has_growing_state(self) -> bool:
        """True if any state grows with the sequence, so that a pool can run out."""
        return any(spec.reach is None for spec in StateCost.from_modules(find_active_state_modules(self.model)).paged)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one request's slot state."""
        return StateCost.from_modules(find_active_state_modules(self.model)).bytes_per_request

    def sequence(self, prompt_len: int | None = None) -> TokenSequence:
        """Return the tested sequence; by default all tokens except the last are the prompt."""
        return split(self.token_ids, len(self.token_ids) - (prompt_len or len(self.token_ids) - 1))

    def stranger(self, prompt_len: int, count: int) -> TokenSequence:
        """Return another request with random tokens."""
        vocab = self.model.config.vocab_size
        ids = [self._random.randrange(vocab) for _ in range(prompt_len + count)]
        return split(ids, count)

    def sharing(self, length: int) -> TokenSequence:
        """Return another request that shares the first `length` tokens and then has one different prompt token."""
        other = (self.token_ids[length] + 1) % self.model.config.vocab_size
        return TokenSequence((*self.token_ids[:length], other), self.stranger(1, 6).continuation)

    def full(self) -> Record:
        """Return the record of one full forward."""
        return self.engine().score([self.sequence()])[0]
