"""Workers that stop, hang, send garbage, or outlive rank 0: an error within the time limit, and nothing left behind."""

from __future__ import annotations

import signal
import socket
import threading
import time
from datetime import timedelta

import msgspec
import pytest

from helpers import hf_checkpoint
from lamella import LLM, SamplingParams, WorkerError
from lamella.engine.ranks import workers
from lamella.engine.ranks.messages import Channel
from lamella.parallel import group

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
OPTIONS = {"device": "cpu", "dtype": "float32", "tensor_parallel_size": 2, "num_blocks": 64, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("two") / "llama"
    hf_checkpoint(
        folder,
        LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        ),
    )  # fmt: skip
    return folder


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setenv("LAMELLA_WORKER_TIMEOUT", "6")  # more than a busy machine delays a thread


def generate(llm):
    return llm.generate({"prompt_token_ids": [3, 4, 5]}, GREEDY, use_tqdm=False)


def worker_of(llm):
    return llm.engine.workers._ranks[0].process


def test_a_worker_that_is_stopped_in_a_step_is_an_error(folder, short_limit):
    llm = LLM(folder, **OPTIONS)
    generate(llm)
    worker_of(llm).send_signal(signal.SIGSTOP)
    with pytest.raises(
        WorkerError, match=r"rank 1 ended .*did not respond for 6 s \(stopped or stuck\), and was killed"
    ):
        generate(llm)
    with pytest.raises(WorkerError, match="make a new engine"):
        generate(llm)
    assert worker_of(llm).poll() is not None


def test_a_worker_that_is_stopped_while_it_loads_is_an_error(folder, monkeypatch, short_limit):
    real = workers._Rank.__init__

    def stopped(self, rank):
        real(self, rank)
        self.process.send_signal(signal.SIGSTOP)

    monkeypatch.setattr(workers._Rank, "__init__", stopped)
    with pytest.raises(WorkerError, match="did not respond for 6 s"):
        LLM(folder, **OPTIONS)


@pytest.mark.slow
def test_a_worker_that_does_not_read_a_large_message_is_an_error(folder, short_limit):
    llm = LLM(folder, **OPTIONS, max_model_len=200)
    prompts = [{"prompt_token_ids": [3] * 150} for _ in range(3000)]
    worker_of(llm).send_signal(signal.SIGSTOP)
    with pytest.raises(WorkerError):
        llm.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.slow
def test_a_worker_that_is_idle_for_longer_than_the_limit_stays(folder, short_limit):
    llm = LLM(folder, **OPTIONS)
    expected = generate(llm)[0].outputs[0].token_ids
    time.sleep(8)
    assert generate(llm)[0].outputs[0].token_ids == expected
    llm.engine.close()


GARBAGE = {
    "length": b"\xff" * 64,
    "text": b"\x05\0\0\0\0\0\0\0hello",
    "no message": b"\x02\0\0\0\0\0\0\0\x91\xc0",
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_no_message(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        with pytest.raises((ValueError, msgspec.MsgspecError)):
            Channel(ours).receive_available()


def test_garbage_from_a_worker_is_an_error(folder):
    data = GARBAGE["length"]
    llm = LLM(folder, **OPTIONS)
    watch, rank = llm.engine.workers._watch, llm.engine.workers._ranks[0]
    rank.channel._received += data  # as if it had been sent; the next message completes it
    assert watch.seen.wait(20)
    with pytest.raises(WorkerError, match="sent something that is not a message"):
        generate(llm)
    assert rank.process.poll() is not None


def test_no_thread_stays_behind(folder):
    before = {thread.name for thread in threading.enumerate()}
    llm = LLM(folder, **OPTIONS)
    llm.engine.close()
    end = time.monotonic() + 10
    while "lamella-watch" in {thread.name for thread in threading.enumerate()} - before and time.monotonic() < end:
        time.sleep(0.1)
    assert "lamella-watch" not in {thread.name for thread in threading.enumerate()} - before


def test_a_collective_that_times_out_is_a_worker_error(folder, monkeypatch):
    monkeypatch.setattr(group, "TIMEOUT", timedelta(seconds=5))  # before the limit of 60 s for a silent worker
    llm = LLM(folder, **OPTIONS)
    generate(llm)
    worker_of(llm).send_signal(signal.SIGSTOP)
    with pytest.raises(WorkerError, match="could not exchange data"):
        generate(llm)
    assert worker_of(llm).poll() is not None
