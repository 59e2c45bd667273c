"""Every path of every architecture is correct, including state; wrong paths and paths not taken are detected."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from covering import covering
from helpers import canon_checkpoint, hf_checkpoint
from lamella.errors import ParameterError
from lamella.layers.context import require_batch
from lamella.parity import paths
from lamella.parity.catalogue import catalogue
from lamella.parity.forcing import ForcedEngine
from lamella.parity.laboratory import Laboratory, NotExercised
from lamella.parity.tested_model import ModelUnderTest
from models.test_llama4 import CONFIGS as LLAMA4
from parity.test_bisection import SHAPE, change_history, forgot_the_history, layer, load

CPU = torch.device("cpu")
LATER = {"token by token in graphs"}
PROMPTS = {"prompts": "random", "count": 1, "prompt_len": 40, "decode_len": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
MODELS = {
    "llama": lambda folder: hf_checkpoint(folder, LlamaConfig(**SHAPE | {"attention_bias": True})),
    "qwen3": lambda folder: hf_checkpoint(folder, Qwen3Config(**SHAPE)),
    "qwen3, window": lambda folder: hf_checkpoint(folder, Qwen3Config(**SHAPE | WINDOW)),
    "llama 4": lambda folder: hf_checkpoint(folder, LLAMA4["scout"]),
    "llama 4, top 2": lambda folder: hf_checkpoint(folder, LLAMA4["top 2"]),
    "llama 4, no block ends with a chunk": lambda folder: hf_checkpoint(
        folder, LLAMA4["chunk that no block ends with"]
    ),
    "canon": lambda folder: canon_checkpoint(folder, num_hidden_layers=3, qk_norm=True),
    "canon, kernel 5": lambda folder: canon_checkpoint(folder, canon_kernel=5, canon_bias=True, canon_activation=True),
    "canon A, lingua": lambda folder: canon_checkpoint(folder, canon_set="A", rope_version="lingua", rope_dim=8),
}


@pytest.fixture(scope="module")
def canon(tmp_path_factory):
    return canon_checkpoint(tmp_path_factory.mktemp("canon"), num_hidden_layers=3, qk_norm=True)


@covering({"model": list(MODELS), "dtype": ["float32", "bfloat16"]}, strength=1)
def test_every_path_is_right(model, dtype, tmp_path):
    MODELS[model](tmp_path)
    matrix = paths(tmp_path, dtype=dtype, device="cpu", **PROMPTS)
    assert not matrix.failures, matrix.failures
    taken = [cell for cell in matrix.cells if cell.status == "pass"]
    held = "llama 4" in model and dtype == "bfloat16"  # experts, which two ranks choose by themselves
    not_taken = {cell.path for cell in matrix.cells} - {cell.path for cell in taken}
    assert not_taken == (LATER | {"two tensor-parallel ranks"} if held else LATER)
    assert all(cell.why for cell in matrix.cells if cell.status == "unavailable")
    stateless = {cell.path for cell in taken if cell.state_max is None}
    assert stateless == (set() if held else {"a plain module, no engine", "two tensor-parallel ranks"})
    if dtype == "float32":
        assert all(cell.agreement == 1 and cell.logprob_max < 1e-4 and (cell.state_max or 0) < 1e-5 for cell in taken)


def test_chunks_are_split_around_windows_and_blocks(canon):
    names = {path.name for path in catalogue(ModelUnderTest.open(canon).config, 48, CPU)}
    assert {f"chunked, cut at {cut}" for cut in (1, 2, 3, 4, 5, 15, 16, 17, 46)} <= names  # W is 4, a block is 16
    assert {f"chunked, every {size}" for size in (2, 3, 4, 5, 15, 16, 17)} <= names


def failures(folder, inject, dtype="float32"):
    candidate = load(folder, getattr(torch, dtype))
    with torch.no_grad():
        inject(candidate)
    return {cell.path: cell for cell in paths(folder, candidate=candidate, **PROMPTS).failures}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_history_forgotten_between_chunks_shows_in_the_chunked_paths(canon, dtype):
    failed = failures(canon, forgot_the_history, dtype)
    assert {"chunked, cut at 5", "chunked, every 16"} <= failed.keys()
    assert not {"full forward, again", "token by token from the first", "recycled blocks and slot"} & failed.keys()
    assert "differ" in failed["chunked, cut at 5"].why


def test_a_key_lost_on_a_new_block_shows(canon):
    def inject(model):
        attention = layer(model).mixer.attention
        inner = attention.forward

        def forward(q, k, v):
            batch = require_batch().ragged
            lost = (batch.positions % 16 == 0) & (batch.positions > 0) & (batch.num_decodes > 0)
            return inner(q, torch.where(lost[:, None, None], 0.0, k), v)

        attention.forward = forward

    failed = failures(canon, inject)
    assert "token by token from the first" in failed and "chunked, cut at 16" not in failed


def test_a_stale_state_after_the_last_step_is_detected(canon):
    """The last decode step is correct but leaves a stale history, so that no log-probability is wrong yet."""
    last = PROMPTS["prompt_len"] + PROMPTS["decode_len"] - 2

    def change(rows, batch):
        return rows.clone() if batch.num_decodes and int(batch.positions[0]) == last else rows

    failed = failures(canon, lambda model: change_history(layer(model).mixer.canon, change))
    cell = failed["prompt, then token by token"]
    assert cell.logprob_max < 1e-4 and cell.state_worst == "model.layers.1.history"
    assert "the state of model.layers.1.history differs by" in cell.why


def test_leaking_slot_memory_is_detected_as_not_bitwise_equal(canon):
    """A convolution whose result contains a small part of the slot's previous contents."""

    def inject(model):
        conv = layer(model).mixer_canon
        state_module, inner = conv.history.state_module, conv.forward

        def forward(x):
            state = state_module.current()
            before = 0.0 if state is None else state.tensors[0][state.slots[0], 0, 0].nan_to_num(1.0)
            return inner(x) + 1e-3 * before

        conv.forward = forward

    cell = failures(canon, inject)["recycled blocks and slot"]
    assert cell.why == "must be bitwise equal, and is not"


def test_a_wrong_full_forward_does_not_raise_the_limits_of_paths(canon):
    candidate = load(canon)
    layer(candidate).mixer.o_proj.weight.fill_(torch.nan)
    matrix = paths(canon, candidate=candidate, **PROMPTS)
    assert len(matrix.failures) == len(matrix.cells) - len(LATER) - 1  # no rank can load the candidate


def test_a_path_that_was_not_taken_fails(canon, monkeypatch):
    whole = ForcedEngine.score
    monkeypatch.setattr(ForcedEngine, "score", lambda self, sequences, budgets=(): whole(self, sequences))
    cells = {cell.path: cell for cell in paths(canon, **PROMPTS).cells}
    assert cells["chunked, cut at 3"].why == "not exercised: steps of [47] tokens, not [3, 44]"
    assert cells["chunked, every 3"].status == "pass"


def test_a_preemption_that_did_not_happen_fails(canon, monkeypatch):
    tested = ModelUnderTest.open(canon)
    lab = Laboratory(tested.load(torch.float32, CPU), CPU, range(40), 0)
    engine = lab.engine
    monkeypatch.setattr(lab, "engine", lambda **options: engine(**options | {"num_blocks": 100}))
    (preempted,) = (path for path in catalogue(tested.config, 40, CPU) if path.name == "preempted in a small pool")
    with pytest.raises(NotExercised, match="nothing was preempted"):
        preempted.run(lab)


def test_too_short_a_sequence_is_refused(canon):
    with pytest.raises(ParameterError, match="paths need a sequence of at least 16 tokens, not 5"):
        paths(canon, prompts=[list(range(5))])


@pytest.fixture(scope="module")
def llama4(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama4")
    hf_checkpoint(made, LLAMA4["scout"])
    return made


def test_paths_split_and_hit_at_the_ends_of_attention_chunks(llama4):
    names = {path.name for path in catalogue(ModelUnderTest.open(llama4).config, 48, CPU)}
    assert {
        "chunked, cut at 15",
        "chunked, cut at 16",
        "chunked, cut at 17",
        "prefix hit at a chunk's end, 32",
    } <= names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_router_in_decodes_is_detected_with_pinned_experts(llama4, dtype):
    def inject(model):
        router = layer(model).feed_forward.router
        inner = router.forward

        def forward(x):
            return inner(x if require_batch().ragged.num_decodes == 0 else x * 0.5)

        router.forward = forward

    failed = failures(llama4, inject, dtype)
    assert "token by token from the first" in failed and "chunked, cut at 16" not in failed
    if dtype == "bfloat16":
        assert "the state of model.layers.1.feed_forward.router differs" in failed["token by token from the first"].why


def test_a_late_attention_chunk_in_decodes_is_detected(llama4):
    """A CUDA graph that captured the chunk of its first step would behave like this."""

    def inject(model):
        attention = layer(model).mixer.attention
        inner = attention.forward

        def forward(q, k, v):
            batch = require_batch().ragged
            late = batch.num_decodes > 0 and int(batch.positions[0]) % 16 == 0
            return inner(q, k, v) if not late else inner(q, k, v) + v.repeat_interleave(5, 1) * 0.1

        attention.forward = forward

    assert "token by token from the first" in failures(llama4, inject)
