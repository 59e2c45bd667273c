"""Comparison of placements of a supernet: loss, speed and state size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lamella.bench.workloads import Timing, Workload, measure
from lamella.config import ModelConfig, Placement, main_placement, mixer_names, read_placement
from lamella.errors import ConfigError
from lamella.layers.supernet.placing import activate
from lamella.parity import score
from lamella.parity.scores import Scores
from lamella.serve.llm import LLM


@dataclass(frozen=True)
class Swept:
    """Measurements of one placement.

    Attributes:
        placement: as the caller wrote it.
        loss: teacher-forced loss on the text, nats per token.
        kl: KL divergence of the main placement's distribution from this one's, nats per token.
        decode_ms: milliseconds of a decode step of all requests of the workload.
        prefill_tok_s: prompt tokens per second.
        bytes_per_token: of state.
        bytes_per_request: of state.
        best: True if the placement is Pareto-optimal in loss and decode time.
    """

    placement: str
    loss: float
    kl: float
    decode_ms: float
    prefill_tok_s: float
    bytes_per_token: int
    bytes_per_request: int
    best: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, rounded to 6 decimals."""
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def usual_placements(config: ModelConfig) -> list[str]:
    """Return typical placements: each mixer in all layers, in every 2nd and 4th layer, and between attention layers."""
    found = []
    for name in mixer_names(config):
        written = [f"all-{name}"]
        if name != "attention":
            written += [f"bookend-attn-{name}", f"every2nd-{name}", f"every4th-{name}"]
        for each in written:
            try:
                read_placement(each, config)
            except ConfigError:
                continue  # a layer has no such mixer
            found.append(each)
    return found


def sweep(
    llm: LLM, model: str, written: Sequence[str], workload: Workload, repeats: int = 3, **inputs: Any
) -> Iterator[Swept]:
    """Measure placements one after the other.

    Args:
        llm: the supernet.
        model: its name, for `lamella.parity.score`.
        written: placements, see `read_placement`. Equal ones are measured once.
        workload: of the time measurement.
        repeats: repetitions of the time measurement.
        inputs: arguments of `lamella.parity.score`: prompts, count, prompt_len, decode_len, seed, load_format,
            hf_overrides.

    Yields:
        The measurements of each placement.

    Raises:
        ConfigError: a placement is invalid or its state does not fit. Raised before anything is measured.
    """
    config = llm.engine.model.config
    placements: dict[Placement, str] = {}
    for each in written:
        placements.setdefault(read_placement(each, config), each)
    for placement in placements:
        llm.engine.variants.check(placement)
    main = _scores(llm, model, main_placement(config), inputs)
    for placement, name in placements.items():
        found = _scores(llm, model, placement, inputs)
        llm.set_placement(placement)
        timing: Timing = measure(llm, workload, repeats)
        assert timing.decode_ms_per_step is not None
        cost = llm.engine.cost
        yield Swept(
            placement=name,
            loss=-float(torch.cat([scores.target for scores in found]).mean()),
            kl=float(torch.cat([_kl(a, b) for a, b in zip(main, found, strict=True)]).mean()),
            decode_ms=timing.decode_ms_per_step,
            prefill_tok_s=timing.prompt_tok_s,
            bytes_per_token=cost.bytes_per_token,
            bytes_per_request=cost.bytes_per_request,
        )


def is_pareto_optimal(swept: Sequence[Swept]) -> list[bool]:
    """Return a flag for each placement: False if another one is as good in loss and decode time, and better in one."""

    def is_dominated(one: Swept) -> bool:
        return any(
            other.loss <= one.loss
            and other.decode_ms <= one.decode_ms
            and (other.loss < one.loss or other.decode_ms < one.decode_ms)
            for other in swept
        )

    return [not is_dominated(one) for one in swept]


def _scores(llm: LLM, model: str, placement: Placement, inputs: dict[str, Any]) -> list[Scores]:
    """Return the log-probabilities of the text, from a second engine over the same weights."""
    loaded = llm.engine.model
    activate(loaded, placement)
    try:
        options = {"enforce_eager": True}  # capturing graphs would take longer than it saves in this short use
        return score(model, candidate=loaded, placement=placement, engine_options=options, **inputs)[1]
    finally:
        activate(loaded, llm.placement)
        llm.engine.memory.bind()  # the second engine has bound its own state to the layers


def _kl(main: Scores, found: Scores) -> Tensor:
    """Return the KL divergence at each position.

    Over the whole vocabulary, or, with top-k scores, over the likeliest tokens of `main` that `found` has, too.
    """
    p = main.logprobs.double()
    if main.ids is None or found.ids is None:
        assert main.ids is None and found.ids is None
        return (p.exp() * (p - found.logprobs.double())).sum(-1)
    known = main.ids[:, :, None] == found.ids[:, None, :]
    q = torch.where(known, found.logprobs.double()[:, None, :], 0.0).sum(-1)
    return torch.where(known.any(-1), p.exp() * (p - q), 0.0).sum(-1)
