"""Two processes over gloo equal one process, and both end if one of them ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial

import pytest
import torch

from covering import mostly_slow
from helpers import canon_checkpoint, hf_checkpoint, random_prompts
from lamella import LLM, AsyncLLM, SamplingParams
from lamella.engine.loading import load_engine
from lamella.engine.options import EngineOptions
from lamella.errors import CheckpointError, ConfigError, ParameterError, WorkerError

# Small enough for chunks, preemption and evictions.
OPTIONS = dict(
    device="cpu", dtype="float32", max_num_batched_tokens=24, max_num_seqs=6, block_size=4, num_blocks=45, seed=5
)
PROMPTS = random_prompts([1, 2, 5, 17, 40, 90, 3, 33])
VOCAB = 127  # odd: the ranks' parts of the vocabulary differ


def llama(folder):
    from transformers import LlamaConfig

    hf_checkpoint(
        folder,
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, mlp_bias=True, max_position_embeddings=256,
        ),
    )  # fmt: skip
    return folder


def qwen(folder):
    from transformers import Qwen3Config

    hf_checkpoint(
        folder,
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
        ),
    )  # fmt: skip
    return folder


def llama4(folder, experts=4):
    from transformers import Llama4TextConfig

    hf_checkpoint(
        folder,
        Llama4TextConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=24, intermediate_size_mlp=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=experts, num_experts_per_tok=2,
            interleave_moe_layer_step=2, attention_chunk_size=16, floor_scale=20, max_position_embeddings=256,
            pad_token_id=0,
        ),
    )  # fmt: skip
    return folder


def canon(folder):
    return canon_checkpoint(folder, vocab_size=VOCAB, qk_norm=True, num_key_value_heads=1, canon_bias=True)


PAIRS = {
    "llama": (llama, {}),
    "qwen": (qwen, {}),
    "llama4": (llama4, {}),
    "whole experts": (partial(llama4, experts=5), {"enable_expert_parallel": True}),
    "canon": (canon, {}),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory):
    """Return engines of a model on one rank and on two ranks."""
    make, more = PAIRS[request.param]
    folder = make(tmp_path_factory.mktemp("pair"))
    one, two = LLM(folder, **OPTIONS), LLM(folder, **OPTIONS, **more, tensor_parallel_size=2)
    assert not two.engine.runner.async_scheduling
    yield one, two
    two.engine.close()


@pytest.fixture(scope="module")
def canon_folder(tmp_path_factory):
    return canon(tmp_path_factory.mktemp("canon"))


@pytest.fixture(params=[False, True], ids=["one by one", "asynchronous"])
def engines(pair, request):
    for llm in pair:
        llm.engine.runner.async_scheduling = request.param
        llm.reset_prefix_cache()
    return pair


def worker(llm: LLM):
    return llm.engine.workers._ranks[0].process


def rows(output):
    """Return all log-probabilities of a prompt, (length - 1, vocab)."""
    return torch.tensor([[row[i].logprob for i in range(VOCAB)] for row in output.prompt_logprobs[1:]])


def test_prompts_and_greedy_tokens(engines):
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=VOCAB, logprobs=3, ignore_eos=True)
    expected, ours = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in engines)
    assert engines[1].stats()["preemptions"] > 0
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        torch.testing.assert_close(rows(mine), rows(theirs), atol=1e-4, rtol=0)
        for a, b in zip(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert {i: v.logprob for i, v in a.items()} == pytest.approx({i: v.logprob for i, v in b.items()}, abs=1e-4)
    assert engines[1].stats()["blocks_used"] == 0


def test_every_way_of_sampling(engines):
    params = [
        SamplingParams(temperature=1.2, seed=1, max_tokens=1),
        SamplingParams(temperature=0.9, seed=2, max_tokens=15, stop_token_ids=list(range(0, VOCAB, 9))),
        SamplingParams(temperature=1.5, seed=3, top_k=30, top_p=0.8, max_tokens=20, n=2),
        SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12, repetition_penalty=1.3, presence_penalty=0.5, seed=4),
        SamplingParams(temperature=0, max_tokens=18, min_tokens=6, stop_token_ids=list(range(VOCAB))),
        SamplingParams(temperature=1.0, seed=-(2**63), max_tokens=14, logit_bias={5: 4.0}, min_p=0.01),
        SamplingParams(temperature=0.7, seed=2**63 - 1, max_tokens=16, logprobs=2),
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    ]
    results = []
    for llm in engines:
        # The second time over recycled memory, and over prefixes of the first.
        both = [llm.generate(PROMPTS, params, use_tqdm=False) for _ in range(2)]
        results.append([[(c.token_ids, c.finish_reason) for o in outputs for c in o.outputs] for outputs in both])
    assert results[1] == results[0]


def test_prefixes_are_found(engines):
    prompt = PROMPTS[4]["prompt_token_ids"]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    results = []
    for llm in engines:
        before = llm.stats()["prefix_hit_tokens"]
        (first,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        longer = [*prompt, *first.outputs[0].token_ids, 1, 2, 3]
        others = [{"prompt_token_ids": ids} for ids in (longer, [*longer[:-1], 9], [*prompt[:20], 7])]
        outputs = llm.generate(others, params, use_tqdm=False)
        hits = llm.stats()["prefix_hit_tokens"] - before
        assert hits > 0
        results.append((first.outputs[0].token_ids, [o.outputs[0].token_ids for o in outputs], hits))
    assert results[1] == results[0]


def test_cancelled_requests_are_removed_on_all_ranks(engines):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for llm in engines:
        stream = llm.stream(PROMPTS[3], params)
        for _ in range(4):
            next(stream)
        stream.close()
    one, two = (llm.generate(PROMPTS[:4], params, use_tqdm=False) for llm in engines)
    assert [o.outputs[0].token_ids for o in one] == [o.outputs[0].token_ids for o in two]
    encoder = engines[1].engine.workers._encoder
    assert len(encoder._sent) <= 4


@pytest.mark.parametrize("pair", mostly_slow(["canon", "llama4"], fast=[]), indirect=True)
def test_ranks_compile_the_same_programs(pair):
    """The programs include sums over ranks."""
    one, _ = pair
    one.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=VOCAB, ignore_eos=True)
    compiled = LLM(one.engine.options.model, **OPTIONS, tensor_parallel_size=2, enable_compile=True)
    with closing(compiled.engine):
        for mine, theirs in zip(
            *(llm.generate(PROMPTS[2:5], params, use_tqdm=False) for llm in (compiled, one)), strict=True
        ):
            assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
            torch.testing.assert_close(rows(mine), rows(theirs), atol=1e-4, rtol=0)


def test_a_killed_worker_raises_an_error_without_hanging(canon_folder):
    llm = LLM(canon_folder, **OPTIONS, tensor_parallel_size=2)
    stream = llm.stream(PROMPTS[3], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    next(stream)
    worker(llm).kill()
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"^tensor-parallel rank 1 ended with exit code -9$"):
        list(stream)
    with pytest.raises(WorkerError, match="have been stopped: tensor-parallel rank 1 ended"):
        llm.generate(PROMPTS, use_tqdm=False)
    assert time.monotonic() - start < 5
    assert llm.stats()["blocks_used"] == 0


def test_a_killed_worker_in_the_middle_of_a_step(canon_folder):
    """The worker is stopped, so that rank 0 waits for it in a collective, and is then killed."""
    llm = LLM(canon_folder, **OPTIONS, tensor_parallel_size=2)
    os.kill(worker(llm).pid, signal.SIGSTOP)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {worker(llm).pid}"])
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 ended with exit code -9"):
        llm.generate(PROMPTS, use_tqdm=False)
    assert 0.5 < time.monotonic() - start < 6


def test_every_waiting_caller_gets_the_error(canon_folder):
    async def run():
        llm = AsyncLLM(canon_folder, **OPTIONS, tensor_parallel_size=2)
        params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
        started = asyncio.Event()

        async def call(index):
            async for _ in llm.generate(PROMPTS[index], params):
                started.set()

        calls = [asyncio.create_task(call(index)) for index in range(3)]
        await started.wait()
        process = llm.engine.workers._ranks[0].process
        process.kill()
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, WorkerError)
        await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_an_error_on_rank_0_stops_the_others(canon_folder):
    llm = LLM(canon_folder, **OPTIONS, tensor_parallel_size=2)
    process = worker(llm)
    llm.engine.runner.launch = lambda chunks: 1 / 0
    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS[:1], use_tqdm=False)
    assert process.poll() is not None
    with pytest.raises(WorkerError, match="stopped: ZeroDivisionError on rank 0"):
        llm.generate(PROMPTS[:1], use_tqdm=False)


def test_workers_end_with_the_engine_and_with_its_process(canon_folder, tmp_path):
    llm = LLM(canon_folder, **OPTIONS, tensor_parallel_size=2)
    process, folder = worker(llm), llm.engine.workers._folder
    assert folder.stat().st_mode & 0o077 == 0
    del llm
    gc.collect()
    assert process.poll() is not None and not folder.exists()

    script = (
        "import os, sys; from lamella import LLM\n"
        f"llm = LLM({str(canon_folder)!r}, device='cpu', num_blocks=8, tensor_parallel_size=2)\n"
        "print(llm.engine.workers._ranks[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    # A killed rank 0 cannot remove the rendezvous folder; its workers do.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    pid = int(done.stdout)
    end = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < end, "the worker has outlived rank 0"
        time.sleep(0.05)
    assert not list(tmp_path.glob("lamella-*"))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_loading_error_starts_no_worker(canon_folder, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    for folder, size, line in (
        (canon_checkpoint(tmp_path / "odd", num_attention_heads=3, num_key_value_heads=1), 2, "num_attention_heads=3"),
        (canon_folder, 3, "num_attention_heads=4: must be divisible by tensor_parallel_size=3"),
        (canon_folder, True, "tensor_parallel_size=True"),
        (canon_folder, -1, "tensor_parallel_size=-1"),
    ):
        with pytest.raises(ConfigError, match=line) as error:
            LLM(folder, device="cpu", tensor_parallel_size=size)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="enable_expert_parallel=True: no layer of the model has experts"):
        LLM(canon_folder, device="cpu", tensor_parallel_size=2, enable_expert_parallel=True)
    assert not started


def test_a_workers_loading_error_is_reported(canon_folder, tmp_path, monkeypatch):
    """For the worker only, the file is damaged after rank 0 has read its shard."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((canon_folder / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        LLM(broken, device="cpu", tensor_parallel_size=2)

    model = LLM(canon_folder, device="cpu", num_blocks=8).engine.model
    monkeypatch.setattr("lamella.engine.loading.load_shard", lambda *_: model)
    with pytest.raises(WorkerError, match=r"^tensor-parallel rank 1 ended with exit code 1: CheckpointError: .*read"):
        load_engine(EngineOptions(model=broken, tensor_parallel_size=2, **OPTIONS))


def test_parameters_that_cannot_be_sent_are_rejected_without_harm(pair):
    """Every parameter is either rejected or can be sent to other ranks, and the ranks keep running."""
    _, two = pair
    for fields in (dict(top_k=2**31), dict(top_k=2**64), dict(max_tokens=2**64), dict(stop_token_ids=[2**70]),
                   dict(seed=-(2**63)), dict(logit_bias={5: 1}), dict(min_tokens=2**70, max_tokens=None)):  # fmt: skip
        with suppress(ParameterError):
            params = SamplingParams(**{"temperature": 0.5, "max_tokens": 2, **fields})
            two.generate([{"prompt_token_ids": [1]}], params, use_tqdm=False)
    assert two.generate(PROMPTS[:1], SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_nan_of_one_rank_ends_its_request_on_all(engines):
    """The damaged row is in rank 0's shard of the embedding."""
    one, two = engines
    if two.engine.model.config.tie_word_embeddings:
        pytest.skip("the row is in every request's logits")
    params, bad = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), 5
    good = [prompt for prompt in PROMPTS if bad not in prompt["prompt_token_ids"]]
    params = replace(params, logit_bias={bad: -100})
    right = [output.outputs[0].token_ids for output in one.generate(good, params, use_tqdm=False)]
    row = two.engine.model.model.embed_tokens.weight.data[bad]
    before = row.clone()
    row.fill_(torch.nan)
    failed, *outputs = two.generate([{"prompt_token_ids": [7, bad, 9]}, *good], params, use_tqdm=False)
    row.copy_(before)
    assert failed.outputs[0].finish_reason == "error"
    assert [output.outputs[0].token_ids for output in outputs] == right


def test_a_forked_child_does_not_touch_the_ranks(canon_folder):
    llm = LLM(canon_folder, **OPTIONS, tensor_parallel_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
        child = os.fork()
    if child == 0:
        try:
            llm.generate(PROMPTS[:1], use_tqdm=False)
        except WorkerError as error:
            llm.engine.workers._finalizer()  # as an orderly end of the child does
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    time.sleep(0.2)
    assert worker(llm).poll() is None
    assert llm.generate(PROMPTS[:1], SamplingParams(max_tokens=2), use_tqdm=False)[0].finished
    llm.engine.close()


def test_later_calls_report_the_first_error_of_rank_0(canon_folder):
    llm = LLM(canon_folder, **OPTIONS, tensor_parallel_size=2)
    llm.engine.runner.launch = None
    with pytest.raises(TypeError):
        llm.generate(PROMPTS[:1], use_tqdm=False)
    with pytest.raises(WorkerError, match="TypeError on rank 0; make a new engine"):
        llm.generate(PROMPTS[:1], use_tqdm=False)
