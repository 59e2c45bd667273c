"""Compile a model's attention parts and feed-forward parts with torch.compile: one program for all parts that match.

Layers with the same operations and shapes share a program, so the number of programs does not grow with the depth. What
differs between these layers is passed as tensors: weights, cos/sin of positions, and the handle of the state module
(`ops.opaque`).
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
from lamella.layers.compiled.program_keys import feed_forward_program_keys, mixer_program_keys
from lamella.layers.context import ForwardBatch, forward_batch, require_batch
from lamella.layers.decoder import DecoderLayer, LanguageModel
from lamella.layers.rotary import Positions
from lamella.layers.supernet.stochastic import Stochastic
from lamella.ops.ragged import RaggedBatch

logger = logging.getLogger("lamella")

# torch.compile specializes on a dimension of size 1, which would need a second program.
MIN_TOKENS = 2
# Request lengths of the warm-up forwards: one prompt, then decodes, to check that one program serves both.
_WARM_UPS = ((7,), (1,) * MIN_TOKENS)

HiddenAndResidual: TypeAlias = tuple[Tensor, Tensor]  # (T, hidden_size) each


class CompiledModel:
    """Forward of a model through compiled programs, for batches of at least `MIN_TOKENS` tokens.

    `warm_up` compiles the programs. Afterwards a call that would need a recompilation raises a RuntimeError.
    """

    min_tokens = MIN_TOKENS

    def __init__(self, model: LanguageModel) -> None:
        """Prepare the layers of `model` in place; compile nothing yet. Results of the layers stay bitwise equal."""
        self._model = model
        make_opaque(model)
        self._mixer_programs, self._feed_forward_programs = (
            _programs(_run_mixer, mixer_program_keys(model)),
            _programs(_run_feed_forward, feed_forward_program_keys(model)),
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the programs that the active placement needs and that are not compiled yet; change no state.

        Raises:
            ConfigError: torch.compile fails.
        """
        layers = [layer for layer in self._model.model.layers if isinstance(layer, DecoderLayer)]
        programs = {self._mixer_programs[_active_mixer(layer)] for layer in layers} | {
            self._feed_forward_programs[layer] for layer in layers
        }
        missing = [program for program in programs if not program.is_ready]
        if not missing:
            return
        # Imported here because the compiler doubles the import time, and few engines use it.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        start = time.perf_counter()
        try:
            with tqdm(total=len(missing), desc="compiling", unit="program", dynamic_ncols=True) as bar:
                for program in missing:
                    program.on_ready = bar.update
                for lengths in _WARM_UPS:
                    self._forward_without_state(lengths)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            why = str(error).strip().partition("\n")[0]
            raise ConfigError(f"enable_compile=True: torch.compile fails: {why}") from error
        logger.info("compiled %d programs (%.1f s)", len(missing), time.perf_counter() - start)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the hidden states (T, hidden_size) after the final norm for the current batch's ids (T,)."""
        with torch.compiler.set_stance("fail_on_recompile"):
            return self._forward(input_ids)

    def _forward(self, input_ids: Tensor) -> Tensor:
        assert input_ids.shape[0] >= MIN_TOKENS
        batch = require_batch()
        return self._model.model(input_ids, batch.ragged.positions, batch.given, self._call)

    def _forward_without_state(self, lengths: Sequence[int]) -> None:
        """Run a forward of requests of these lengths, without stored state."""
        device = self._model.model.norm.weight.device
        with forward_batch(ForwardBatch(RaggedBatch.from_lengths(lengths, lengths, device))):
            self._forward(torch.zeros(sum(lengths), dtype=torch.int64, device=device))

    def _call(self, layer: DecoderLayer, positions: Positions, hidden: Tensor, residual: Tensor) -> HiddenAndResidual:
        mixer = _active_mixer(layer)
        inputs = PositionInputs.from_layer(mixer, positions) if isinstance(mixer, Attention) else None
        hidden, residual = self._mixer_programs[mixer](layer, mixer, positions.index, inputs, hidden, residual)
        return self._feed_forward_programs[layer](layer, hidden, residual)


class _Program:
    """Compiled function whose inputs are modules and tensors (T, ...), with any T of at least `MIN_TOKENS`.

    Attributes:
        is_ready: whether the function has been compiled.
        on_ready: called once after the compilation.
    """

    def __init__(self, function: Callable[..., HiddenAndResidual], name: str) -> None:
        # A copy of the code object: torch.compile caches programs by code object, across all engines of the process.
        code = function.__code__.replace(co_name=name)
        self._run = torch.compile(FunctionType(code, function.__globals__, name), fullgraph=True, dynamic=False)
        self.is_ready = False
        self.on_ready: Callable[[], object] = lambda: None

    def __call__(self, *inputs: Any) -> HiddenAndResidual:
        if self.is_ready:
            return self._run(*inputs)
        from torch._dynamo import mark_dynamic

        for tensor in _tensors(inputs):
            mark_dynamic(tensor, 0)
        result = self._run(*inputs)
        self.is_ready = True
        self.on_ready()
        return result


def _tensors(inputs: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors, also inside tuples, that have a row per token."""
    for value in inputs:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.dim():
            yield value


def _programs(
    function: Callable[..., HiddenAndResidual], keys: Mapping[nn.Module, Hashable]
) -> dict[nn.Module, _Program]:
    """Return the program of each module; modules with equal keys share one."""
    distinct = dict.fromkeys(keys.values())
    programs = {key: _Program(function, f"{function.__name__}_{index}") for index, key in enumerate(distinct)}
    return {module: programs[key] for module, key in keys.items()}


def _run_mixer(
    layer: DecoderLayer,
    mixer: nn.Module,
    index: Tensor,
    inputs: PositionInputs | None,
    hidden: Tensor,
    residual: Tensor,
) -> HiddenAndResidual:
    return layer.apply_mixer(mixer, GivenPositions(index, inputs), hidden, residual)


def _run_feed_forward(layer: DecoderLayer, hidden: Tensor, residual: Tensor) -> HiddenAndResidual:
    return layer.apply_feed_forward(hidden, residual)


def _active_mixer(layer: DecoderLayer) -> nn.Module:
    """Return the mixer of a layer, or the active mixer of a stochastic layer."""
    return layer.mixer.mixers[layer.mixer.active] if isinstance(layer.mixer, Stochastic) else layer.mixer
