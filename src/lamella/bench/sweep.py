"""Placements of a supernet beside each other: what each loses, how fast it is, and what it keeps."""

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
    """One placement's figures.

    Attributes:
        placement: as it was written.
        loss: nats a token of the given text, tokens forced.
        kl: of the main placement's distribution from this one's, nats a token.
        decode_ms: of a step of all the workload's requests.
        prefill_tok_s: of all the workload's prompts.
        bytes_per_token, bytes_per_request: of state.
        best: whether no other placement is at least as good in loss and in decode time, and better in one.
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
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def usual_placements(config: ModelConfig) -> list[str]:
    """A family for a first look: each mixer alone, in every second and every fourth layer, and between attention."""
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
    """The figures of each of the `written` placements; `inputs` are of `lamella.parity.score`: prompts, count,
    prompt_len, decode_len, seed, load_format, hf_overrides.

    Raises `ConfigError`, before anything is run, where one of them is bad or does not fit.
    """
    config = llm.engine.model.config
    placements: dict[Placement, str] = {}
    for each in written:
        placements.setdefault(read_placement(each, config), each)
    for placement in placements:
        llm.engine.variants.check(placement)
    truth = _scores(llm, model, main_placement(config), inputs)
    for placement, name in placements.items():
        found = _scores(llm, model, placement, inputs)
        llm.set_placement(placement)
        timing: Timing = measure(llm, workload, repeats)
        assert timing.decode_ms_per_step is not None
        cost = llm.engine.cost
        yield Swept(
            placement=name,
            loss=-float(torch.cat([scores.target for scores in found]).mean()),
            kl=float(torch.cat([_kl(a, b) for a, b in zip(truth, found, strict=True)]).mean()),
            decode_ms=timing.decode_ms_per_step,
            prefill_tok_s=timing.prompt_tok_s,
            bytes_per_token=cost.bytes_per_token,
            bytes_per_request=cost.bytes_per_request,
        )


def front(swept: Sequence[Swept]) -> list[bool]:
    """For each, whether it is `best`."""

    def beaten(one: Swept) -> bool:
        return any(
            other.loss <= one.loss
            and other.decode_ms <= one.decode_ms
            and (other.loss < one.loss or other.decode_ms < one.decode_ms)
            for other in swept
        )

    return [not beaten(one) for one in swept]


def _scores(llm: LLM, model: str, placement: Placement, inputs: dict[str, Any]) -> list[Scores]:
    """Log-probabilities of the text, by an engine of its own over the same weights."""
    loaded = llm.engine.model
    activate(loaded, placement)
    try:
        options = {"enforce_eager": True}  # graphs of an engine that lives this long would not pay
        return score(model, candidate=loaded, placement=placement, engine_options=options, **inputs)[1]
    finally:
        activate(loaded, llm.placement)
        llm.engine.memory.bind()  # the other engine had its own state bound


def _kl(truth: Scores, found: Scores) -> Tensor:
    """Of each position, over the vocabulary, or over the tokens that are likeliest in the truth and known of both."""
    p = truth.logprobs.double()
    if truth.ids is None or found.ids is None:
        assert truth.ids is None and found.ids is None
        return (p.exp() * (p - found.logprobs.double())).sum(-1)
    known = truth.ids[:, :, None] == found.ids[:, None, :]
    q = torch.where(known, found.logprobs.double()[:, None, :], 0.0).sum(-1)
    return torch.where(known.any(-1), p.exp() * (p - q), 0.0).sum(-1)
