"""Steps of several placements: cut by requests or with rows selected, and the graphs of the latter.

Where there is no GPU, a stand-in for a graph runs the captured forward again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apriel2_models import MIXERS, SUPERNET, block, checkpoint, config, fixed
from helpers import VOCAB, poisoned_llm, random_prompts
from lamella import LLM, SamplingParams
from lamella.engine import graphs, runner
from lamella.layers.placements import CutPlacements, SelectedPlacements, unite
from lamella.ops.backend import portable_only

NAMES = tuple(MIXERS)
A, B, C = "all-gdn", "mamba,attention,kda", "swa,attention,sliding_window"


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("supernet"), fixed(SUPERNET, layers=3))


@pytest.fixture(scope="module")
def convolved(tmp_path_factory):
    """With a layer without a choice, and canons in front of and within the mixers, whose history is the layer's."""
    canon = {"kernel_size": 4, "bias": True}
    blocks = {"free": block(SUPERNET, canon=canon), "plain": block(MIXERS["attention"])}
    decoder = {"type": "pattern", "num_blocks": 3, "pattern": ["free", "plain", "free"], "blocks": blocks}
    return checkpoint(tmp_path_factory.mktemp("convolved"), config(decoder))


def engine(folder, **options) -> LLM:
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "num_blocks": 64} | options
    return poisoned_llm(folder, mixed_placements=True, enable_prefix_caching=False, **options)


def parameters(placements: Sequence[Any], count: int = 6) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0, max_tokens=count + index, ignore_eos=True, logprobs=VOCAB, placement=placement)
        for index, placement in enumerate(placements)
    ]


def answers(llm: LLM, lengths: Sequence[int], params: Sequence[SamplingParams]) -> tuple[list[list[int]], torch.Tensor]:
    """The tokens, and all log-probabilities of all answers one after the other."""
    return answers_to(llm, random_prompts(lengths), params)


def answers_to(llm: LLM, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Any:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    rows = [[row[i].logprob for i in range(VOCAB)] for out in outputs for row in out.outputs[0].logprobs]
    return [out.outputs[0].token_ids for out in outputs], torch.tensor(rows)


def select_rows(llm: LLM) -> list[int]:
    """Have an engine select rows in every step that only decodes, without graphs; the sizes of these steps."""
    inputs, counts = llm.engine.runner.inputs, []
    build = inputs.build

    def selecting(shares, *arguments):
        step = build(shares, *arguments)
        cut = step.batch.placements
        if cut is None or shares[-1].count != 1:
            return step
        assert isinstance(cut, CutPlacements)
        union, said = unite(frozenset(cut.by_request))
        tables = torch.tensor([said[placement] for placement in cut.by_request], dtype=torch.int32).T
        counts.append(len(shares))
        return replace(step, batch=replace(step.batch, placements=SelectedPlacements(union, tables)))

    inputs.build = selecting
    return counts


def state(llm: LLM) -> list[torch.Tensor]:
    """Of all places but the dummies."""
    return [tensor[1:] for tensor in llm.engine.memory.tensors]


@settings(max_examples=12, deadline=None)
@given(
    placements=st.lists(st.tuples(*(st.sampled_from(NAMES),) * 3), min_size=2, max_size=4),
    lengths=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    portable=st.booleans(),
)
def test_selected_rows_are_those_of_a_batch_that_is_cut(supernet, placements, lengths, portable):
    """Over memory full of NaN, the dummies' too: the same answers, and the same state of every request."""
    params = parameters([list(placement) for placement in placements])
    with portable_only() if portable else nullcontext():
        cut, selected = engine(supernet), engine(supernet)
        counts = select_rows(selected)
        expected = answers(cut, lengths[: len(params)], params)
        found = answers(selected, lengths[: len(params)], params)
    assert counts or len(set(placements)) == 1
    assert found[0] == expected[0]
    assert (found[1] - expected[1]).abs().max() <= 2e-5
    for mine, other in zip(state(selected), state(cut), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, equal_nan=True)


class TestUnions:
    def test_layers_that_divide_the_placements_alike_share_a_table(self):
        one = ("gdn", None, "kda", "mamba", "gdn")
        other = ("attention", None, "kda", "attention", "kda")
        union, said = unite(frozenset([one, other]))
        assert union.names == (("attention", "gdn"), (), ("kda",), ("attention", "mamba"), ("gdn", "kda"))
        assert union.tables == (0, -1, -1, 0, 1) and union.num_tables == 2
        assert said == {one: (1, 0), other: (0, 1)}

    def test_one_placement_needs_no_table(self):
        union, said = unite(frozenset([(None, "gdn")]))
        assert union.names == ((), ("gdn",)) and union.num_tables == 0 and said == {(None, "gdn"): ()}

    def test_a_union_is_its_mixers_whoever_needs_which(self):
        one, other = unite(frozenset([("x", "x"), ("y", "z")])), unite(frozenset([("y", "x"), ("x", "z")]))
        third = unite(frozenset([("x", "x"), ("x", "z"), ("y", "z"), ("y", "x")]))
        assert one[0].names == other[0].names == third[0].names
        assert one[0] != other[0] == replace(third[0], tables=other[0].tables)


@dataclass(eq=False)
class Again:
    """A stand-in for a graph."""

    forward: Any
    hidden: torch.Tensor
    replays: int = 0
    gone: bool = False

    def replay(self) -> None:
        assert not self.gone
        self.hidden.copy_(self.forward())
        self.replays += 1

    def reset(self) -> None:
        self.gone = True


@pytest.fixture
def recorded(monkeypatch) -> list[Again]:
    """The graphs that were captured, by the stand-in."""
    found: list[Again] = []

    def record(forward, pool):
        assert pool == "pool"
        found.append(Again(forward, forward()))
        return found[-1], found[-1].hidden

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return found


def with_graphs(llm: LLM) -> LLM:
    """An engine of the CPU that takes the stand-ins for graphs."""
    own = llm.engine.runner
    own._sizes, own._captures = graphs.bucket_sizes(len(own._tokens)), True
    own.runs_ahead = True
    return llm


LENGTHS = (5, 17, 1, 9)


@pytest.mark.parametrize("own", [(A, B, A, B), (A, B, C, B), (None, C, C, C), (B, B, B, B)])
def test_steps_in_graphs(supernet, recorded, own):
    """Each request gets what it gets alone, as requests end and the steps grow smaller; a second time without another
    capture."""
    prompts, params = random_prompts(LENGTHS), parameters(own)
    llm, plain = with_graphs(engine(supernet)), engine(supernet)
    alone = [answers_to(plain, [prompt], [param]) for prompt, param in zip(prompts, params, strict=True)]
    for captures in (True, False):
        before = len(recorded)
        tokens, rows = answers_to(llm, prompts, params)
        assert (len(recorded) > before) == captures
        assert tokens == [found[0] for (found, _) in alone]
        assert (rows - torch.cat([found for _, found in alone])).abs().max() <= 2e-5
    assert llm.engine.runner.num_replays == sum(graph.replays for graph in recorded)
    assert llm.engine.stats()["graph_steps"] > 8


def test_a_capture_leaves_the_tokens_of_a_step_in_flight(supernet, recorded, monkeypatch):
    """What is captured while a step is in flight draws tokens of its own."""
    llm = with_graphs(engine(supernet))
    tokens, seen = llm.engine.runner._tokens, []
    capture = graphs.DecodeGraphs._capture

    def watched(self, rows):
        before = tokens.clone()
        result = capture(self, rows)
        seen.append((before, tokens.clone()))
        return result

    monkeypatch.setattr(graphs.DecodeGraphs, "_capture", watched)
    expected = answers(engine(supernet), LENGTHS, parameters((A, B, C, A)))
    found = answers(llm, LENGTHS, parameters((A, B, C, A)))
    assert found[0] == expected[0] and (found[1] - expected[1]).abs().max() <= 2e-5
    assert len(seen) >= 3 and all(torch.equal(*pair) for pair in seen) and any(pair[0].any() for pair in seen)


def test_the_graphs_of_so_many_unions_are_kept(supernet, recorded, monkeypatch):
    """The latest used; the others are released, and captured again when they are wanted."""
    monkeypatch.setattr(runner, "_KEPT_GRAPHS", 2)
    llm, plain = with_graphs(engine(supernet)), engine(supernet)
    for pair in ((A, B), (A, C), (A, B), (B, C), (A, B), (A, C)):
        params = parameters(pair, 4)[:1] + parameters(pair[::-1], 4)[:1]
        assert answers(llm, (3, 4), params)[0] == answers(plain, (3, 4), params)[0]
        assert len(llm.engine.runner._graphs) <= 2
    alive = [graph for graph in recorded if not graph.gone]
    held = [graph.graph for each in llm.engine.runner._graphs.values() for graph in each._graphs.values()]
    assert set(map(id, alive)) == set(map(id, held)) and len(recorded) > len(alive) > 0
    llm.engine.runner.drop_graphs()
    assert all(graph.gone for graph in recorded) and not llm.engine.runner._graphs
    count = len(recorded)
    answers(llm, (3, 4), parameters((A, B)))
    assert len(recorded) == count
