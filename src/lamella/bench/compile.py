"""Cost of compiling a model in three forms, each measured in its own process.

The forms are the engine's own, and two that work for any module. Shapes and layers are the model's; weights are random
fp32. Tokens come in steps of `SIZES`, as in serving.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoint.files import open_checkpoint
from lamella.config import ModelConfig, placed, read_placement
from lamella.errors import EngineError
from lamella.layers.compiled.model import MIN_TOKENS, CompiledModel
from lamella.layers.compiled.opaque import make_opaque
from lamella.layers.context import ForwardBatch, forward_batch
from lamella.layers.decoder import LanguageModel
from lamella.layers.local_kit import LocalKit
from lamella.models.base import initialize
from lamella.ops.ragged import RaggedBatch
from lamella.processes import module_command

SIZES = (64, 33, 1, 128, 7, 2)
LIMIT = 1e-4  # largest allowed difference from eager hidden states, whose values are about 1
# No caches of earlier runs, and no compiler processes whose CPU time would not be counted.
_ALONE = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CompileCost:
    """Measurement of one form of compiling.

    Attributes:
        form: name, see `FORMS`.
        layers: depth of the model.
        graphs: number of compiled programs.
        recompiles: the failed guard of each recompilation.
        gave_up: True if torch.compile has reached its recompile limit and runs the rest eagerly.
        cpu_seconds: CPU time of all steps on one thread, and of the compilers, without the start-up of torch.compile.
        difference: largest absolute difference from the eager hidden states, whose values are about 1.
    """

    form: str
    layers: int
    graphs: int
    recompiles: list[str]
    gave_up: bool
    cpu_seconds: float
    difference: float

    @property
    def is_right(self) -> bool:
        """True if the results agree with eager execution."""
        return self.difference <= LIMIT


def compile_costs(
    model: str,
    layers: Sequence[int] = (),
    placement: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[CompileCost]:
    """Measure each form of compiling.

    Args:
        model: folder, GGUF file, `demo` or Hub id.
        layers: depths to measure; the layers of the model are repeated. Empty: the model's depth.
        placement: for a supernet, the active mixers.
        overrides: values that replace those of the config file.

    Yields:
        The measurement of each depth and form.

    Raises:
        ConfigError: the config is not supported.
        CheckpointError: there is no such model.
        EngineError: a form fails.
    """
    config = open_checkpoint(model, overrides).read_config()
    read_placement(placement, config)
    for depth in layers or (len(config.layers),):
        for form in FORMS:
            task = {
                "model": model,
                "form": form,
                "layers": depth,
                "placement": placement,
                "overrides": None if overrides is None else dict(overrides),
            }
            command = module_command("lamella.bench.compile", json.dumps(task))
            done = subprocess.run(command, env=os.environ | _ALONE, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                raise EngineError(f"compiling, {form}, {depth} layers: {last}")
            yield CompileCost(**json.loads(done.stdout.splitlines()[-1]))


def _lamella(model: LanguageModel) -> Forward:
    """Compile as the engine does: one program per kind of part, before the first step. Further programs are errors."""
    compiled = CompiledModel(model)
    compiled.warm_up()
    return compiled


def _whole_model(model: LanguageModel) -> Forward:
    """Compile all layers as one program."""
    stack = torch.compile(model.model)
    return lambda ids: stack(ids, torch.arange(ids.shape[0]))


def _each_layer(model: LanguageModel) -> Forward:
    """Compile each layer by itself."""
    for layer in model.model.layers:
        layer.compile()
    return lambda ids: model.model(ids, torch.arange(ids.shape[0]))


FORMS = {"lamella": _lamella, "whole model": _whole_model, "each layer": _each_layer}


def _measure(
    form: str, model: str, layers: int, placement: str | None, overrides: Mapping[str, Any] | None
) -> CompileCost:
    """Measure one form. Must run in a process that has compiled nothing before."""
    from torch._dynamo import utils

    torch.set_num_threads(1)  # idle threads spin, and their CPU time would be counted
    utils.set_compilation_metrics_limit(1 << 16)
    checkpoint = open_checkpoint(model, overrides)
    config = checkpoint.read_config()
    config = with_depth(placed(config, read_placement(placement, config)), layers)
    built: LanguageModel = checkpoint.allocate(config, LocalKit(torch.float32))
    initialize(built.eval().requires_grad_(False), torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = [_run(built, size) for size in SIZES]
        make_opaque(built)
        torch.compile(torch.sin)(torch.zeros(MIN_TOKENS))  # start-up of torch.compile, equal for all forms
        torch.compiler.reset()
        utils.clear_compilation_metrics()
        graphs = utils.counters["stats"]["unique_graphs"]
        with _record_limit_messages() as gave_up:
            start = _cpu_seconds()
            forward, least = FORMS[form](built), MIN_TOKENS if form == "lamella" else 1
            results = [_run(forward, size, least) for size in SIZES]
            seconds = _cpu_seconds() - start
    reasons = [metrics.recompile_reason for metrics in utils.get_compilation_metrics()]
    return CompileCost(
        form=form,
        layers=layers,
        graphs=utils.counters["stats"]["unique_graphs"] - graphs,
        recompiles=[_guard(reason) for reason in reasons if reason],
        gave_up=bool(gave_up),
        cpu_seconds=round(seconds, 2),
        difference=max(float((a - b).abs().max()) for a, b in zip(results, expected, strict=True)),
    )


def _guard(reason: str) -> str:
    """Return the failed guard of a recompile reason, without program number and source line."""
    first = reason.strip().partition("\n")[0]
    return re.split(r"\s+# ", re.sub(r"^\d+/\d+: ", "", first))[0]


def with_depth(config: ModelConfig, layers: int) -> ModelConfig:
    """Return the config with `layers` layers, by repeating its own layers."""
    return replace(config, layers=tuple(islice(cycle(config.layers), layers)))


def _run(forward: Forward, size: int, least: int = 1) -> Tensor:
    """Return hidden states (size, hidden_size) of one request, in a batch that is filled up to `least` tokens."""
    lengths = (size, *(1,) * (least - size))
    ids = torch.arange(sum(lengths)) % 7
    with forward_batch(ForwardBatch(RaggedBatch.from_lengths(lengths, lengths))):
        return forward(ids)[:size]


@contextmanager
def _record_limit_messages() -> Iterator[list[logging.LogRecord]]:
    """Collect the log messages of reached recompile limits, which torch reports in no other way."""
    records: list[logging.LogRecord] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "hit config." in str(record.msg):
                records.append(record)

    logger, handler = logging.getLogger("torch._dynamo.convert_frame"), Recorder()
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its finished child processes."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(**json.loads(sys.argv[1])))))
