"""Steps with several placements: divided batches, row selection, and graphs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apriel2_models import ATTENTION, MIXERS, SUPERNET, checkpoint, fixed, pattern
from helpers import random_prompts
from lamella import LLM
from lamella.engine.steps import graphs, runner
from lamella.layers.context import BlockView, ForwardBatch
from lamella.layers.supernet.batches import GatheredPlacements, MaskedBatch, MaskedPlacements, build_mixer_union
from lamella.ops.backend import portable_only
from lamella.ops.ragged import RaggedBatch
from lamella.state.spec import PagedState
from mixed_steps import A, B, C, FakeGraph, answers, answers_to, fake_graphs, mixed_llm, parameters, with_graphs

NAMES = tuple(MIXERS)


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("supernet"), fixed(SUPERNET, layers=3))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Return a supernet in which one layer has no choice."""
    values = pattern(["free", "plain", "free", "free"], {"free": SUPERNET, "plain": ATTENTION})
    return checkpoint(tmp_path_factory.mktemp("hybrid"), values)


def select_rows(llm: LLM) -> list[int]:
    """Make an engine select rows in every decode step, without graphs; return the list of these steps' sizes."""
    inputs, counts = llm.engine.runner.inputs, []
    build = inputs.build

    def selecting(chunks, *arguments):
        step = build(chunks, *arguments)
        cut = step.batch.placements
        if cut is None or chunks[-1].count != 1:
            return step
        assert isinstance(cut, GatheredPlacements)
        union, said = build_mixer_union(frozenset(cut.by_request))
        tables = torch.tensor([said[placement] for placement in cut.by_request], dtype=torch.int32).T
        counts.append(len(chunks))
        return replace(step, batch=replace(step.batch, placements=MaskedPlacements(union, tables)))

    inputs.build = selecting
    return counts


def state(llm: LLM) -> list[torch.Tensor]:
    """Return all state except the dummies."""
    return [tensor[1:] for tensor in llm.engine.memory.tensors]


@settings(max_examples=25, deadline=None)
@given(
    placements=st.lists(st.tuples(*(st.sampled_from(NAMES),) * 3), min_size=2, max_size=4),
    lengths=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    portable=st.booleans(),
)
def test_selected_rows_equal_divided_batches(hybrid, placements, lengths, portable):
    """With memory full of NaN, dummies included, outputs and states of all requests are equal."""
    params = parameters([list(placement) for placement in placements])
    with portable_only() if portable else nullcontext():
        cut, selected = mixed_llm(hybrid), mixed_llm(hybrid)
        counts = select_rows(selected)
        expected = answers(cut, lengths[: len(params)], params)
        found = answers(selected, lengths[: len(params)], params)
    assert counts or len(set(placements)) == 1
    assert found[0] == expected[0]
    assert (found[1] - expected[1]).abs().max() <= 2e-5
    for mine, other in zip(state(selected), state(cut), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_rows_of_other_placements_use_dummies():
    """Rows of other placements have one token of context on the dummies; selected rows do not change."""
    spec = PagedState(2, 16, torch.float32)
    view = BlockView(torch.tensor([[5, 7], [6, 8]]), torch.tensor([73, 66]), torch.empty(0), 8)
    ragged = RaggedBatch.from_lengths([1, 1], [10, 3])
    part = MaskedBatch.from_mask(
        ForwardBatch(ragged, {spec: view}, torch.tensor([4, 9])), torch.tensor([False, True]), None
    )
    seen = part.batch
    assert seen.blocks is not None and seen.slots is not None
    assert seen.ragged.seq_lens.tolist() == [10, 1] and seen.ragged.positions.tolist() == [9, 0]
    assert seen.slots.tolist() == [4, 0] and seen.blocks[spec].slot_mapping.tolist() == [73, 0]


class TestUnions:
    def test_layers_with_equal_divisions_share_a_table(self):
        one = ("gdn", None, "kda", "mamba", "gdn")
        other = ("attention", None, "kda", "attention", "kda")
        union, said = build_mixer_union(frozenset([one, other]))
        assert union.names == (("attention", "gdn"), (), ("kda",), ("attention", "mamba"), ("gdn", "kda"))
        assert union.tables == (0, -1, -1, 0, 1) and union.num_tables == 2
        assert said == {one: (1, 0), other: (0, 1)}

    def test_one_placement_needs_no_table(self):
        union, said = build_mixer_union(frozenset([(None, "gdn")]))
        assert union.names == ((), ("gdn",)) and union.num_tables == 0 and said == {(None, "gdn"): ()}

    def test_union_does_not_depend_on_request_order(self):
        one, other = (
            build_mixer_union(frozenset([("x", "x"), ("y", "z")])),
            build_mixer_union(frozenset([("y", "x"), ("x", "z")])),
        )
        third = build_mixer_union(frozenset([("x", "x"), ("x", "z"), ("y", "z"), ("y", "x")]))
        assert one[0].names == other[0].names == third[0].names
        assert one[0] != other[0] == replace(third[0], tables=other[0].tables)


@pytest.fixture
def recorded(monkeypatch) -> list[FakeGraph]:
    """Return the list of captured graphs, recorded by the fake."""
    return fake_graphs(monkeypatch)


LENGTHS = (5, 17, 1, 9)


@pytest.mark.parametrize("own", [(A, B, A, B), (A, B, C, B), (None, C, C, C), (B, B, B, B)])
def test_steps_in_graphs(supernet, recorded, own):
    """Each request gets the tokens that it gets alone, also when requests end; the second time nothing is captured."""
    prompts, params = random_prompts(LENGTHS), parameters(own)
    llm, plain = with_graphs(mixed_llm(supernet)), mixed_llm(supernet)
    alone = [answers_to(plain, [prompt], [param]) for prompt, param in zip(prompts, params, strict=True)]
    for captures in (True, False):
        before = len(recorded)
        tokens, rows = answers_to(llm, prompts, params)
        assert (len(recorded) > before) == captures
        assert tokens == [found[0] for (found, _) in alone]
        assert (rows - torch.cat([found for _, found in alone])).abs().max() <= 2e-5
    assert llm.engine.runner.num_replays == sum(graph.replays for graph in recorded)
    assert llm.engine.stats()["graph_steps"] > 8


def test_capture_keeps_tokens_of_an_in_flight_step(supernet, recorded, monkeypatch):
    """A capture samples tokens itself, and must restore those of the in-flight step."""
    llm = with_graphs(mixed_llm(supernet))
    tokens, seen = llm.engine.runner._tokens, []
    capture = graphs.DecodeGraphs._capture

    def watched(self, rows):
        before = tokens.clone()
        result = capture(self, rows)
        seen.append((before, tokens.clone()))
        return result

    monkeypatch.setattr(graphs.DecodeGraphs, "_capture", watched)
    expected = answers(mixed_llm(supernet), LENGTHS, parameters((A, B, C, A)))
    found = answers(llm, LENGTHS, parameters((A, B, C, A)))
    assert found[0] == expected[0] and (found[1] - expected[1]).abs().max() <= 2e-5
    assert len(seen) >= 3 and all(torch.equal(*pair) for pair in seen) and any(pair[0].any() for pair in seen)


def test_number_of_kept_graph_sets_is_limited(supernet, recorded, monkeypatch):
    """The latest used graphs are kept; the others are released, and captured again when needed."""
    monkeypatch.setattr(runner, "_KEPT_GRAPHS", 2)
    llm, plain = with_graphs(mixed_llm(supernet)), mixed_llm(supernet)
    for pair in ((A, B), (A, C), (A, B), (B, C), (A, B), (A, C)):
        params = parameters(pair, 4)[:1] + parameters(pair[::-1], 4)[:1]
        assert answers(llm, (3, 4), params)[0] == answers(plain, (3, 4), params)[0]
        assert len(llm.engine.runner._graphs) <= 2
    alive = [graph for graph in recorded if not graph.is_released]
    held = [graph.graph for each in llm.engine.runner._graphs.values() for graph in each._graphs.values()]
    assert set(map(id, alive)) == set(map(id, held)) and len(recorded) > len(alive) > 0
    llm.engine.runner.drop_graphs()
    assert all(graph.is_released for graph in recorded) and not llm.engine.runner._graphs
    count = len(recorded)
    answers(llm, (3, 4), parameters((A, B)))
    assert len(recorded) == count


def test_host_buffers_of_graphs_alternate(supernet, recorded, monkeypatch):
    """On a GPU the copy of the previous step may still be running while the next step is written."""
    llm = with_graphs(mixed_llm(supernet))
    inputs, written = llm.engine.runner.inputs, []
    fill = inputs.fill
    monkeypatch.setattr(
        inputs, "fill", lambda arrays, *rest: (written.append(arrays["slots"].ctypes.data), fill(arrays, *rest))
    )
    answers_to(llm, random_prompts([3]), parameters([B], count=6))
    assert llm.engine.runner.num_replays >= 5
    replayed = written[-llm.engine.runner.num_replays :]
    assert len(set(replayed)) == 2 and all(one != next_one for one, next_one in pairwise(replayed))
