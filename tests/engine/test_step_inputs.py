"""Input tensors of a step, field by field: request rows, padding rows, and buffers of graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.features import StepFeature, StepFeatures
from lamella.engine.steps.step_inputs import Layout, StepInputs
from lamella.ops.attention.paged import AttentionSpace
from lamella.state.manager import StateManager
from lamella.state.spec import PagedState

pytestmark = pytest.mark.unit
BLOCK = 4
GROUPS = (PagedState(1, 8, torch.float32), PagedState(1, 8, torch.float32, window=6))


@pytest.fixture
def state():
    return StateManager(GROUPS, (40, 40), 6, BLOCK, has_slot_state=True)


def request_of(state, name, length, computed=0, **params):
    request = Request(name, [10 * length + i for i in range(length)], SamplingParams(**params), seed=-7)
    assert state.allocate(request, length)
    request.num_computed = computed
    return request


class PromptLengths(StepFeature):
    """Step feature with its own array: the length of each request's prompt plus the step's form."""

    def form(self, chunks, replay):
        return 100

    def fields(self, form, requests):
        return {"lengths": (np.int32, (requests,))}

    def fill(self, form, arrays, chunks):
        arrays["lengths"][:] = 0
        arrays["lengths"][: len(chunks)] = [form + len(chunk.request.prompt_token_ids) for chunk in chunks]

    def context(self, form, tensors, chunks):
        return {"given": tensors["lengths"]}


def filled(state, chunks, num_padding, latest=None, features=(), prefill_blocks=0):
    """Fill a buffer that contains other values before."""
    features = StepFeatures(features)
    inputs, forms = StepInputs(state, 64, torch.device("cpu"), None, features), features.forms(chunks, replay=False)
    tokens, rows = sum(chunk.count for chunk in chunks) + num_padding, len(chunks) + num_padding
    layout = Layout(rows, tokens, len(GROUPS), blocks=6, extra=inputs.extra(forms, rows), prefill_blocks=prefill_blocks)
    block = np.full(layout.spans()[1], 0x7B, np.uint8)
    arrays = layout.arrays(block)
    inputs.fill(arrays, chunks, latest or {}, forms)
    return arrays


def test_padding_rows_are_requests_of_one_token_on_the_dummies(state):
    first, second = (request_of(state, name, length, length - 1) for name, length in (("a", 5), ("b", 9)))
    chunks = [Scheduled.from_request(first, 4, 1), Scheduled.from_request(second, 8, 1)]
    arrays = filled(state, chunks, num_padding=2, features=[PromptLengths()])
    assert arrays["slots"].tolist() == [state.allocations[first].slot, state.allocations[second].slot, 0, 0]
    assert arrays["positions"].tolist() == [4, 8, 0, 0]
    assert arrays["seq_lens"].tolist() == [5, 9, 1, 1]
    assert arrays["token_request"].tolist() == [0, 1, 2, 3]
    assert arrays["query_start_loc"].tolist() == [0, 1, 2, 3, 4]
    assert arrays["input_ids"].tolist() == [54, 98, 0, 0]
    assert arrays["lengths"].tolist() == [105, 109, 0, 0]
    assert arrays["block_table"][:, 2:, 0].tolist() == [[0, 0], [0, 0]]
    assert arrays["slot_mapping"][:, 2:].tolist() == [[0, 0], [0, 0]]
    for name in ("seed", "step", "top_k", "temperature", "top_p", "min_p"):
        assert arrays[name][2:].tolist() == [0, 0], name


def test_prefill_rows_and_placeholder_tokens(state):
    decoding, prompt = request_of(state, "a", 6, 5, top_k=3, seed=5, temperature=0.5), request_of(state, "b", 7)
    decoding.num_in_flight = 1
    assert state.allocate(decoding, 7)
    chunks = [Scheduled.from_request(decoding, 6, 1), Scheduled.from_request(prompt, 0, 5)]
    arrays = filled(state, chunks, num_padding=0, latest={decoding: 2})
    assert arrays["input_ids"].tolist() == [-3, 70, 71, 72, 73, 74]
    assert arrays["positions"].tolist() == [6, 0, 1, 2, 3, 4]
    assert arrays["token_request"].tolist() == [0, 1, 1, 1, 1, 1]
    assert arrays["query_start_loc"].tolist() == [0, 1, 6]
    assert arrays["seq_lens"].tolist() == [7, 5]
    assert arrays["step"].tolist() == [1, 0]
    assert arrays["top_k"].tolist() == [3, 0] and arrays["temperature"].tolist() == [0.5, 1.0]
    assert arrays["seed"].tolist() == [-7, -7]
    for group in range(len(GROUPS)):
        for chunk, start in zip(chunks, (0, 1), strict=True):
            blocks = state.allocations[chunk.request].blocks[group]
            rows = [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(chunk.start, chunk.start + chunk.count)]
            assert arrays["slot_mapping"][group, start : start + chunk.count].tolist() == rows
            index = chunks.index(chunk)
            assert arrays["block_table"][group, index, : len(blocks)].tolist() == blocks


def test_block_list_concatenates_blocks_of_prefills(state):
    decoding, short, long = request_of(state, "a", 6, 5), request_of(state, "b", 3), request_of(state, "c", 9)
    chunks = [
        Scheduled.from_request(decoding, 5, 1),
        Scheduled.from_request(short, 0, 3),
        Scheduled.from_request(long, 0, 9),
    ]
    arrays = filled(state, chunks, num_padding=0, prefill_blocks=1 + 3)
    for group in range(len(GROUPS)):
        blocks = [state.allocations[request].blocks[group] for request in (short, long)]
        assert arrays["block_list"][group].tolist() == [*blocks[0], *blocks[1]]


def test_block_list_excludes_decodes(state):
    decoding, prompt = request_of(state, "a", 6, 5), request_of(state, "b", 9)
    space = AttentionSpace(4, 64, torch.device("cpu"))
    chunks = [Scheduled.from_request(decoding, 5, 1), Scheduled.from_request(prompt, 0, 9)]
    for attention, count in ((None, 0), (space, 3)):
        step = StepInputs(state, 64, torch.device("cpu"), attention).build(chunks, {})
        assert {view.block_list.numel() for view in step.batch.blocks.values()} == {count}
        assert step.batch.ragged.num_decodes == 1 and step.batch.ragged.query_lens == (1, 9)
        assert step.batch.ragged.context_lens == (6, 9)


def test_reused_slot_gets_new_blocks_and_parameters(state):
    inputs = StepInputs(state, 64, torch.device("cpu"), None)
    first = request_of(state, "a", 9, 8, temperature=0.25)
    inputs.build([Scheduled.from_request(first, 8, 1)], {})
    slot = state.allocations[first].slot
    state.release(first)
    second = request_of(state, "b", 2, 1, temperature=0.75)
    assert state.allocations[second].slot == slot
    step = inputs.build([Scheduled.from_request(second, 1, 1)], {})
    assert step.sampling["temperature"].tolist() == [0.75]
    for index, view in enumerate(step.batch.blocks.values()):
        blocks = state.allocations[second].blocks[index]
        assert view.block_table[0, : len(blocks)].tolist() == blocks


@pytest.mark.parametrize("num_padding", [0, 1, 3])
def test_padding_is_counted_as_decodes(state, num_padding):
    request = request_of(state, "a", 5, 4)
    step = StepInputs(state, 64, torch.device("cpu"), None).build(
        [Scheduled.from_request(request, 4, 1)], {}, num_padding
    )
    assert step.batch.ragged.num_decodes == step.batch.ragged.num_requests == 1 + num_padding
    assert step.batch.ragged.context_lens == (5, *[1] * num_padding)
    assert step.input_ids.shape == (1 + num_padding,)


def test_feature_arrays_reach_the_batch(state):
    features = StepFeatures([StepFeature(), PromptLengths()])
    chunks = [
        Scheduled.from_request(request_of(state, "a", 5, 4), 4, 1),
        Scheduled.from_request(request_of(state, "b", 9, 2), 2, 3),
    ]
    forms = features.forms(chunks, replay=False)
    step = StepInputs(state, 64, torch.device("cpu"), None, features).build(chunks, {}, forms=forms)
    assert forms == (None, 100) and step.batch.given.tolist() == [105, 109]
