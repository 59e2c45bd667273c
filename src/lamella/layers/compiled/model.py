"""The blocks of a model's layers through torch.compile: one program for each kind, however many layers there are.

What differs between blocks of a kind reaches its program as tensors: weights, the angles of positions, and the number
of whoever holds the state (`ops.opaque`). Nothing is compiled in that another layer has otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lamella.errors import ConfigError
from lamella.layers.attention import Attention
from lamella.layers.compiled.attention import GivenPositions, PositionInputs
from lamella.layers.compiled.opaque import make_opaque
from lamella.layers.compiled.program_keys import feed_forward_kinds, mixer_kinds
from lamella.layers.context import ForwardBatch, forward_batch, require_batch
from lamella.layers.decoder import DecoderLayer, LanguageModel
from lamella.layers.rotary import Positions
from lamella.layers.supernet.stochastic import Stochastic
from lamella.ops.ragged import RaggedBatch

logger = logging.getLogger("lamella")

# torch.compile makes a program of its own for a dimension of 1.
MIN_TOKENS = 2
# Tokens of the forwards in a warm-up: one prompt, then decodes, which show that one program serves both.
_WARM_UPS = ((7,), (1,) * MIN_TOKENS)

Pair: TypeAlias = tuple[Tensor, Tensor]  # hidden states and the residual, (T, hidden_size)


class CompiledModel:
    """The forward of a model within a batch of at least `MIN_TOKENS` tokens, its blocks compiled by `warm_up`.

    From then on nothing is compiled any more: whatever would need another program is a RuntimeError that says why.
    """

    min_tokens = MIN_TOKENS

    def __init__(self, model: LanguageModel) -> None:
        """Nothing is compiled yet. The model's layers are made alike where that changes none of their results."""
        self._model = model
        make_opaque(model)
        self._mix, self._feed = _blocks(_mix, mixer_kinds(model)), _blocks(_feed, feed_forward_kinds(model))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what the active placement needs and has not been compiled yet. No state is touched.

        Raises `ConfigError` where something cannot be compiled.
        """
        layers = [layer for layer in self._model.model.layers if isinstance(layer, DecoderLayer)]
        blocks = {self._mix[_active(layer)] for layer in layers} | {self._feed[layer] for layer in layers}
        missing = [block for block in blocks if not block.ready]
        if not missing:
            return
        # Imported here: the compiler takes as long to import as all the rest, and few engines want it.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        start = time.perf_counter()
        try:
            with tqdm(total=len(missing), desc="compiling", unit="kind of block", dynamic_ncols=True) as bar:
                for block in missing:
                    block.when_ready = bar.update
                for lengths in _WARM_UPS:
                    self._forward_alone(lengths)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            why = str(error).strip().partition("\n")[0]
            raise ConfigError(f"enable_compile=True: torch.compile fails: {why}") from error
        logger.info("compiled %d kinds of blocks (%.1f s)", len(missing), time.perf_counter() - start)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the hidden states (T, hidden_size) after the final norm, of the current batch's ids (T,)."""
        with torch.compiler.set_stance("fail_on_recompile"):
            return self._forward(input_ids)

    def _forward(self, input_ids: Tensor) -> Tensor:
        assert input_ids.shape[0] >= MIN_TOKENS
        batch = require_batch()
        return self._model.model(input_ids, batch.ragged.positions, batch.given, self._call)

    def _forward_alone(self, lengths: Sequence[int]) -> None:
        """Of requests of these lengths, without state."""
        device = self._model.model.norm.weight.device
        with forward_batch(ForwardBatch(RaggedBatch.from_lengths(lengths, lengths, device))):
            self._forward(torch.zeros(sum(lengths), dtype=torch.int64, device=device))

    def _call(self, layer: DecoderLayer, positions: Positions, hidden: Tensor, residual: Tensor) -> Pair:
        mixer = _active(layer)
        inputs = PositionInputs.from_layer(mixer, positions) if isinstance(mixer, Attention) else None
        hidden, residual = self._mix[mixer](layer, mixer, positions.index, inputs, hidden, residual)
        return self._feed[layer](layer, hidden, residual)


class _Block:
    """The program of one kind of block. Its inputs are modules, and tensors (T, ...) whose T may be any."""

    def __init__(self, function: Callable[..., Pair], name: str) -> None:
        # Code of its own: torch.compile keeps programs by code, and of all engines in the process together.
        code = function.__code__.replace(co_name=name)
        self._run = torch.compile(FunctionType(code, function.__globals__, name), fullgraph=True, dynamic=False)
        self.ready = False
        self.when_ready: Callable[[], object] = lambda: None

    def __call__(self, *inputs: Any) -> Pair:
        if self.ready:
            return self._run(*inputs)
        from torch._dynamo import mark_dynamic

        for tensor in _tensors(inputs):
            mark_dynamic(tensor, 0)
        pair = self._run(*inputs)
        self.ready = True
        self.when_ready()
        return pair


def _tensors(inputs: Iterable[Any]) -> Iterator[Tensor]:
    """Those that have a row for each token."""
    for value in inputs:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.dim():
            yield value


def _blocks(function: Callable[..., Pair], kinds: Mapping[nn.Module, Hashable]) -> dict[nn.Module, _Block]:
    """The block of each module, one for each kind."""
    distinct = dict.fromkeys(kinds.values())
    blocks = {kind: _Block(function, f"{function.__name__}_{index}") for index, kind in enumerate(distinct)}
    return {module: blocks[kind] for module, kind in kinds.items()}


def _mix(
    layer: DecoderLayer,
    mixer: nn.Module,
    index: Tensor,
    inputs: PositionInputs | None,
    hidden: Tensor,
    residual: Tensor,
) -> Pair:
    return layer.mix(mixer, GivenPositions(index, inputs), hidden, residual)


def _feed(layer: DecoderLayer, hidden: Tensor, residual: Tensor) -> Pair:
    return layer.feed(hidden, residual)


def _active(layer: DecoderLayer) -> nn.Module:
    """The mixer that computes."""
    return layer.mixer.mixers[layer.mixer.active] if isinstance(layer.mixer, Stochastic) else layer.mixer
