"""Engines whose requests have several placements, and fake CUDA graphs for machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import VOCAB, poisoned_llm, random_prompts
from lamella import LLM, SamplingParams
from lamella.engine.steps import graphs

A, B, C = "all-gdn", "mamba,attention,kda", "swa,attention,sliding_window"


def mixed_llm(folder: Path, **options: Any) -> LLM:
    """Return an engine for mixed placements whose memory, dummies included, is full of NaN."""
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "num_blocks": 64} | options
    return poisoned_llm(folder, mixed_placements=True, enable_prefix_caching=False, **options)


def parameters(placements: Sequence[Any], count: int = 6) -> list[SamplingParams]:
    """Return sampling parameters of requests that end one after the other."""
    return [
        SamplingParams(temperature=0, max_tokens=count + index, ignore_eos=True, logprobs=VOCAB, placement=placement)
        for index, placement in enumerate(placements)
    ]


def answers(llm: LLM, lengths: Sequence[int], params: Sequence[SamplingParams]) -> tuple[list[list[int]], Tensor]:
    """Return the answers to random prompts, see `answers_to`."""
    return answers_to(llm, random_prompts(lengths), params)


def answers_to(llm: LLM, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> tuple[list[list[int]], Tensor]:
    """Return the tokens of each output, and all log-probabilities of all outputs, concatenated."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    rows = [[row[i].logprob for i in range(VOCAB)] for out in outputs for row in out.outputs[0].logprobs]
    return [out.outputs[0].token_ids for out in outputs], torch.tensor(rows)


@dataclass(eq=False)
class FakeGraph:
    """Stand-in for a CUDA graph: the captured forward, run again."""

    forward: Callable[[], Tensor]
    hidden: Tensor
    replays: int = 0
    is_released: bool = False

    def replay(self) -> None:
        assert not self.is_released
        self.hidden.copy_(self.forward())
        self.replays += 1

    def reset(self) -> None:
        self.is_released = True


def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Capture fake graphs instead of CUDA graphs; return the list of captured ones.

    The GPU sampling kernel runs in Triton's interpreter.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there are graphs here, see tests/engine/test_cuda.py")
    found: list[FakeGraph] = []

    def capture_graph(forward: Callable[[], Tensor], pool: Any) -> tuple[FakeGraph, Tensor]:
        assert pool == "pool"
        found.append(FakeGraph(forward, forward()))
        return found[-1], found[-1].hidden

    monkeypatch.setattr(graphs, "capture_graph", capture_graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return found


def with_graphs(llm: LLM) -> LLM:
    """Make a CPU engine run like a GPU engine: decode steps in graphs, asynchronous scheduling."""
    own = llm.engine.runner
    own._sizes, own._captures, own.async_scheduling = graphs.bucket_sizes(len(own._tokens)), True, True
    return llm
