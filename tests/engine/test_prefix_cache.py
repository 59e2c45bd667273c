"""Prefix cache hits do not change tokens, log-probabilities or states."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Llama4TextConfig, LlamaConfig, Qwen3Config

from covering import covering
from helpers import canon_checkpoint, hf_checkpoint, poisoned_llm, random_prompts
from lamella import LLM, SamplingParams
from lamella.engine.loading import _snapshot_prompts
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError, ParameterError
from lamella.layers.context import ForwardBatch
from lamella.layers.segments import snapshot_windows
from lamella.models import registry
from lamella.ops.ragged import RaggedBatch
from lamella.parity import bisect, paths
from lamella.parity.forcing import ForcedEngine
from lamella.parity.sequences import split
from models.test_llama4 import SHAPE as LLAMA4
from parity.test_bisection import SHAPE
from recurrent import hybrid_checkpoint

MODELS = {
    "llama": lambda folder: hf_checkpoint(folder, LlamaConfig(**SHAPE)),
    "windowed": lambda folder: hf_checkpoint(
        folder, Qwen3Config(**SHAPE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1})
    ),
    "chunked": lambda folder: hf_checkpoint(folder, Llama4TextConfig(**LLAMA4 | {"attention_chunk_size": 12})),
    "canon": lambda folder: canon_checkpoint(folder, qk_norm=True),
    "hybrid": hybrid_checkpoint,
}
BLOCK = 4
DEFAULTS = {"block_size": BLOCK, "max_num_seqs": 4, "max_num_batched_tokens": 24, "snapshot_prompts": "always"}
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def only_here():
    """Register the hybrid test architecture during these tests."""
    yield
    registry._targets.pop("HybridForCausalLM", None)


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    MODELS[request.param](made)
    return made


@pytest.fixture(scope="module")
def canon(tmp_path_factory):
    return canon_checkpoint(tmp_path_factory.mktemp("canon"), qk_norm=True)


def make_llm(folder, **options) -> LLM:
    return poisoned_llm(folder, **DEFAULTS | options)


def ids(*parts) -> dict:
    return {"prompt_token_ids": [token for part in parts for token in part]}


def words(seed: int, length: int) -> list[int]:
    return random_prompts([length], seed)[0]["prompt_token_ids"]


def generate(llm, prompts, **params):
    return llm.generate(prompts, SamplingParams(**GREEDY | {"max_tokens": 6, "logprobs": 2} | params), use_tqdm=False)


def same(ours, theirs) -> bool:
    """Return True for equal tokens, and log-probabilities equal up to rounding."""
    pairs = list(zip(ours, theirs, strict=True))
    return all(
        a.outputs[0].token_ids == b.outputs[0].token_ids
        and all(
            x.keys() == y.keys() and all(abs(x[t].logprob - y[t].logprob) < 1e-4 for t in x)
            for x, y in zip(a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True)
        )
        for a, b in pairs
    )


@covering({"model": list(MODELS), "dtype": ["float32", "bfloat16"]}, strength=1)
def test_all_paths_have_right_tokens_and_states(model, dtype, tmp_path):
    """The parity kit's path matrix: hits at and inside blocks, of running requests, after eviction and preemption."""
    MODELS[model](tmp_path)
    matrix = paths(tmp_path, dtype=dtype, device="cpu", prompts="random", count=1, prompt_len=40, decode_len=8)
    assert not matrix.failures, matrix.failures
    prefix = [cell for cell in matrix.cells if "prefix" in cell.path or "turn" in cell.path]
    at_chunks = [cell for cell in prefix if "at a chunk's end" in cell.path]
    assert len(prefix) == 6 + len(at_chunks) and all(
        cell.status == "pass" and cell.state_max is not None for cell in prefix
    )


def test_the_generic_recurrent_mixer_is_right(tmp_path):
    assert bisect(hybrid_checkpoint(tmp_path), prompts="random", count=1, device="cpu").first is None


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_random_interleavings_of_requests_that_share_beginnings(folder, data):
    """Requests with shared beginnings, some cancelled, in small pools with eviction and preemption."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    roots = [words(rng.randrange(3), rng.randrange(1, 60)) for _ in range(3)]
    prompts = []
    for _ in range(22):
        root = rng.choice(roots + [prompt["prompt_token_ids"] for prompt in prompts])
        prompts.append(ids(root[: rng.randrange(1, len(root) + 1)], words(rng.randrange(50), rng.randrange(1, 20))))
    lengths = [rng.randrange(1, 12) for _ in prompts]
    params = [SamplingParams(**GREEDY, max_tokens=length, logprobs=1) for length in lengths]
    blocks = max(-(-(len(p["prompt_token_ids"]) + n) // BLOCK) for p, n in zip(prompts, lengths, strict=True)) + 3
    options = {"max_num_batched_tokens": rng.choice([3, 7, 16, 64]), "max_num_seqs": rng.choice([1, 3, 6])}
    plain = make_llm(folder, enable_prefix_caching=False).generate(prompts, params, use_tqdm=False)
    llm = make_llm(folder, num_blocks=blocks, snapshot_bytes=rng.choice([0, 20_000, 10**7]), **options)
    for index in rng.sample(range(len(prompts)), 3):  # cancelled after a step or two
        for _, output in zip(range(rng.randrange(1, 3)), llm.stream(prompts[index], params[index]), strict=False):
            assert output.outputs
    assert same(llm.generate(prompts, params, use_tqdm=False), plain)
    assert same(llm.generate(prompts[::-1], params[::-1], use_tqdm=False), plain[::-1])
    stats = llm.stats()
    assert stats["blocks_used"] == stats["slots_used"] == 0


def test_hit_lengths_for_each_kind_of_state(folder):
    """28 of 30 shared tokens fill blocks. Snapshots exist at the ends of chunks of 24, and at the last block of a
    prompt."""
    llm, system = make_llm(folder), words(1, 30)
    expected = [0, 24, 28, 28] if llm.engine.cost.slots else [0, 28, 28, 28]
    for i, cached in enumerate(expected):
        prompt = ids(system, words(2 + i, 9))
        ours = generate(llm, [prompt])
        assert ours[0].num_cached_tokens == cached
        assert same(ours, generate(make_llm(folder, enable_prefix_caching=False), [prompt]))


def test_snapshot_interval_takes_snapshots_in_advance(canon):
    system = words(1, 60)
    for interval, cached in ((None, 0), (3, 48), (1, 56)):
        llm = make_llm(canon, snapshot_interval=interval, max_num_batched_tokens=512, snapshot_prompts="never")
        generate(llm, [ids(system, words(2, 9))])
        assert generate(llm, [ids(system[:59], words(3, 9))])[0].num_cached_tokens == cached


def test_fully_cached_prompt_computes_its_last_token(folder):
    llm, prompt = make_llm(folder), ids(words(3, 24))
    first, second = generate(llm, [prompt]), generate(llm, [prompt])
    assert second[0].num_cached_tokens == 20 and same(first, second)


def test_conversation_hits_its_own_answers(folder):
    llm, history, computed = make_llm(folder), words(4, 10), 0
    for turn in range(4):
        plain = generate(make_llm(folder, enable_prefix_caching=False), [ids(history)], max_tokens=13)
        ours = generate(llm, [ids(history)], max_tokens=13)
        assert same(ours, plain)
        assert ours[0].num_cached_tokens == computed // BLOCK * BLOCK
        computed = len(history) + 12  # the last token that came is in no state yet
        history = history + ours[0].outputs[0].token_ids + words(50 + turn, 5)


def test_different_salts_do_not_hit(folder):
    llm, prompt = make_llm(folder), words(5, 30)
    generate(llm, [ids(prompt) | {"cache_salt": "a"}])
    assert [generate(llm, [ids(prompt) | extra])[0].num_cached_tokens for extra in ({"cache_salt": "b"}, {})] == [0, 0]
    assert generate(llm, [ids(prompt) | {"cache_salt": "a"}])[0].num_cached_tokens == 28
    with pytest.raises(ParameterError, match="cache_salt=3: must be a string"):
        generate(llm, [ids(prompt) | {"cache_salt": 3}])


def test_prompt_logprobs_disable_hits(folder):
    llm, prompt = make_llm(folder), ids(words(6, 30))
    generate(llm, [prompt])
    asked = generate(llm, [prompt], prompt_logprobs=1)[0]
    assert asked.num_cached_tokens == 0 and len(asked.prompt_logprobs) == 30
    llm.reset_prefix_cache()
    generate(llm, [prompt], prompt_logprobs=1)  # but it is remembered
    assert generate(llm, [prompt])[0].num_cached_tokens == 28


def test_reset_and_disabled_prefix_cache(folder):
    llm, prompt = make_llm(folder), ids(words(7, 30))
    generate(llm, [prompt])
    llm.reset_prefix_cache()
    llm.engine.state.check_integrity()
    assert generate(llm, [prompt])[0].num_cached_tokens == 0
    off = make_llm(folder, enable_prefix_caching=False)
    generate(off, [prompt])
    assert generate(off, [prompt])[0].num_cached_tokens == 0 and off.stats()["prefix_hit_rate"] is None


def test_the_statistics_add_up(folder):
    llm, system = make_llm(folder), words(8, 28)
    outputs = [generate(llm, [ids(system, words(9 + i, 4))])[0] for i in range(4)]
    stats = llm.stats()
    cached = sum(output.num_cached_tokens for output in outputs)
    assert cached == 3 * 28 == stats["prefix_hit_tokens"] and stats["prefix_hit_rate"] == cached / (4 * 32)
    assert stats["prefix_cached_blocks"] == sum(group["cached"] for group in stats["block_groups"]) > 0
    snapshots = bool(llm.engine.cost.slots)
    assert bool(stats["prefix_snapshots"]) == snapshots
    assert stats["prefix_snapshot_bytes"] == stats["prefix_snapshots"] * llm.engine.cost.bytes_per_request
    assert stats["prefix_evictions"] == 0
    assert ("prefix hits 66% (84 tok)" + ", snapshots 0 MiB" * snapshots) in llm._progress([], 1.0)


def test_snapshots_stay_within_their_budget(canon):
    size = make_llm(canon).engine.cost.bytes_per_request
    llm = make_llm(canon, snapshot_bytes=3 * size, max_num_seqs=2)
    for i in range(9):
        generate(llm, [ids(words(i, 30))])
    stats = llm.stats()
    assert stats["prefix_snapshots"] <= 5 and stats["prefix_evictions"] > 0  # three, and two idle slots
    assert stats["slots"] == 2


def test_windowed_group_frees_blocks_while_running(tmp_path):
    MODELS["windowed"](tmp_path)
    llm = make_llm(tmp_path, enable_prefix_caching=False)
    most = {}
    for _ in llm.stream(ids(words(1, 60)), SamplingParams(**GREEDY, max_tokens=60)):
        for group in llm.stats()["block_groups"]:
            most[group["window"]] = max(most.get(group["window"], 0), group["used"])
    assert most[None] == 30 and most[7] <= (24 + 7) // BLOCK + 2


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"block_size": 512, "max_model_len": 512}, "no prompt of max_model_len=512 fills a block of block_size=512"),
        ({"snapshot_bytes": 0}, "no snapshot of"),
    ],
)
def test_settings_without_prefix_hits_are_logged_once(canon, options, line, caplog):
    with caplog.at_level(logging.WARNING, logger="lamella"):
        llm = make_llm(canon, **options)
        for i in range(3):
            generate(llm, [ids(words(i, 9))])
    assert caplog.text.count(line) == 1


def test_short_prompts_are_logged_once(canon, caplog):
    with caplog.at_level(logging.WARNING, logger="lamella"):
        llm = make_llm(canon, block_size=32)
        for i in range(40):
            generate(llm, [ids(words(i, 9))], max_tokens=1)
    assert caplog.text.count("none of the first 32 prompts is longer than a block") == 1


def test_snapshot_of_the_last_block_needs_no_extra_step(canon):
    prompts = [ids(words(i, 31)) for i in range(2)]
    for policy, steps, cached in (("always", 6, 28), ("busy", 6, 0), ("never", 6, 0)):
        llm = make_llm(canon, snapshot_prompts=policy, max_num_batched_tokens=512)
        generate(llm, prompts[:1])
        assert llm.stats()["steps"] == steps
        assert generate(llm, prompts[:1])[0].num_cached_tokens == cached
    for policy, cached in (("busy", 28), ("never", 0)):  # beside another request the rest joins its step
        llm = make_llm(canon, snapshot_prompts=policy, max_num_batched_tokens=512)
        generate(llm, prompts)
        assert {output.num_cached_tokens for output in generate(llm, prompts)} == {cached}


@pytest.mark.parametrize("whole", [True, False])
def test_convolution_snapshots_are_copied_from_the_input(canon, whole, monkeypatch):
    """Computation in pieces is only for windows that start before their chunk."""
    if whole:
        monkeypatch.setattr("lamella.layers.state_modules.segments", lambda batch: pytest.fail("pieces"))
    else:
        monkeypatch.setattr("lamella.layers.state_modules.snapshot_windows", lambda batch, length: None)
    llm, plain = make_llm(canon, max_num_batched_tokens=512), make_llm(canon, enable_prefix_caching=False)
    for number, cached in enumerate((0, 52, 60)):
        prompts = [ids(words(0, 60), words(number + 2, 5)), ids(words(1, 60), words(number + 2, 7))]
        outputs = generate(llm, prompts)
        assert [output.num_cached_tokens for output in outputs] == [cached, cached]
        assert same(outputs, generate(plain, prompts))


def test_convolution_window_that_starts_before_its_chunk():
    ragged = RaggedBatch.from_lengths([9, 4, 5], [9, 10, 11])
    slots = torch.tensor([0, 1, 2])
    tokens, targets = snapshot_windows(
        ForwardBatch(ragged, slots=slots, snapshots=(((4, 7), (8, 8)), (), ((3, 9),))), 3
    )
    # Position p is in row p % 3: positions 1 to 3 and 5 to 7 of the first request, 6 to 8 of the third.
    assert tokens.tolist() == [[3, 1, 2], [6, 7, 5], [13, 14, 15]] and targets.tolist() == [7, 8, 9]
    assert snapshot_windows(ForwardBatch(ragged, slots=slots, snapshots=((), ((2, 7),), ((3, 9),))), 3) is None


def test_a_second_request_hits_by_default(folder):
    llm = LLM(folder, device="cpu", num_blocks=64, max_num_seqs=4, block_size=BLOCK, max_model_len=200)
    for number in (1, 2):
        (output,) = generate(llm, [ids(words(0, 60), words(number, 9))])
        assert output.num_cached_tokens == 0 if number == 1 else output.num_cached_tokens >= 40


def test_default_snapshot_policy_depends_on_the_device(caplog):
    options, gpu = EngineOptions(model="x"), torch.device("cuda")
    with caplog.at_level("INFO", "lamella"):
        assert _snapshot_prompts(options, torch.device("cpu"), True) == "always"
        assert _snapshot_prompts(replace(options, enable_prefix_caching=False), gpu, True) == "never"
        assert _snapshot_prompts(options, gpu, False) == "never"
        assert not caplog.records
        assert _snapshot_prompts(options, gpu, True) == "never"
    assert "hits from the third request on; snapshot_prompts='always' makes it hit from the second on" in caplog.text
    assert _snapshot_prompts(replace(options, snapshot_prompts="always"), gpu, True) == "always"


def test_bad_cache_options_raise_one_line(canon):
    with pytest.raises(ConfigError, match="snapshot_prompts='sometimes': must be auto, always, never or busy"):
        LLM(canon, device="cpu", snapshot_prompts="sometimes")
    for value in (-1, True, "1G"):
        with pytest.raises(ConfigError, match=r"snapshot_bytes=.*: must be a whole number of at least 0"):
            LLM(canon, device="cpu", snapshot_bytes=value)


def test_cached_states_equal_computed_states(folder):
    """Compare every block and slot of a request that started with a hit, not only its output."""
    model = LLM(folder, device="cpu").engine.model
    options = {"block_size": BLOCK, "num_blocks": 64, "max_num_seqs": 2}
    sequence = split(words(9, 50), 3)
    plain = ForcedEngine(model, options, torch.device("cpu")).score([sequence])[0]
    cached = ForcedEngine(model, options | {"enable_prefix_caching": True}, torch.device("cpu"))
    cached.score([split(sequence.token_ids[:37], 2)])
    ours = cached.score([sequence])[0]
    assert ours.cached == 36 and ours.state.keys() == plain.state.keys()
    for name, value in plain.state.items():
        assert torch.allclose(ours.state[name], value, atol=1e-4), name
