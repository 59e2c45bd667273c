"""vLLM engines on tiny models, and the expected tokens: one full float64 forward per sequence."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import canon_checkpoint, random_prompts
from lamella.demo import CHECKPOINT
from lamella.demo.questions import Question, held_out
from lamella.parity.reference_model import ReferenceModel
from lamella.parity.tested_model import ModelUnderTest

ON_CPU = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
# Engines' memory: little, so that several test processes can share a GPU.
ROOM = {"kv_cache_memory_bytes": 64 << 20} | ({} if ON_CPU else {"gpu_memory_utilization": 0.2})
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",  # compiled means traced, and then run as it stands
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM's float32 kernels would multiply in TF32 on GPUs: enough to send a token to another expert.
    "TRITON_F32_DEFAULT": "ieee",
}
# With AVX2 alone vLLM's answers are off by half a nat, probably since sums of two products saturate at 16 bits.
needs_exact_int8 = pytest.mark.skipif(
    ON_CPU and not torch.cpu._is_vnni_supported(), reason="int8 products are not exact on a CPU without VNNI"
)
# vLLM's attention has heads of 32 channels at least on CPUs.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
EVERYTHING = SHAPE | {"canon_bias": True, "qk_norm": True, "rope_dim": 8, "attention_bias": True, "mlp_bias": True}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
LENGTHS = (1, 2, 3, 4, 5, 9, 40, 170)
MAX_LEN = 256
TOLERANCE = 1e-3  # nats


def canon(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Return a random LlamaCanon with all options on."""
    return canon_checkpoint(folder, seed, **(EVERYTHING | changes))


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [prompt["prompt_token_ids"] for prompt in random_prompts(lengths, seed)]


@contextmanager
def numba_hidden() -> Iterator[None]:
    """Let engines start although drafts or another test have imported numba.

    vLLM 0.32 looks at the variables of all modules when an engine starts on a CPU, and fails at one of llvmlite's.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
        yield


@contextmanager
def running(model: Path, **options: Any) -> Iterator[Any]:
    """Start a vLLM engine."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "seed": 0,
        **ROOM,
    }
    if not ON_CPU:
        # FlashAttention has no float32, and FlashInfer is not everywhere. What is cached and preempted is counted in
        # blocks of CPUs, which GPUs' are half of otherwise.
        settings |= {"attention_backend": "TRITON_ATTN", "block_size": 32}
    gc.freeze()  # vLLM collects garbage many times over
    try:
        with numba_hidden():
            llm = LLM(model=str(model), **(settings | options))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
    finally:
        cleanup_dist_env_and_memory()


@contextmanager
def built(config: Any, folder: Path) -> Iterator[Any]:
    """Build a model inside vLLM without loading weights; `folder` is for the rendezvous of its one process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.model_loader.utils import initialize_model

    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder / 'group'}", 0, "gloo")
        initialize_model_parallel()
        try:
            with DEVICE:
                model = initialize_model(vllm_config=config)
            yield model
        finally:
            cleanup_dist_env_and_memory()


def configured(folder: Path, **options: Any) -> Any:
    """Return vLLM's config of an engine, without building the engine."""
    from vllm import EngineArgs

    settings = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
    return EngineArgs(model=str(folder), **(settings | options)).create_engine_config()


def refused(message: str) -> Any:
    """Expect an error: vLLM's config classes raise one with the text of our `ConfigError`."""
    return pytest.raises(ValueError, match=message)


def generate(llm: Any, prompts: Sequence[Sequence[int]], count: int | Sequence[int] = 24) -> list[Any]:
    """vLLM's outputs of `count` greedy tokens each, with their log-probabilities."""
    from vllm import SamplingParams

    counts = [count] * len(prompts) if isinstance(count, int) else count
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=1) for n in counts]
    return llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)


def tokens_of(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@cache
def oracle(model: Path, placement: str | None = None) -> Callable[[list[int]], Tensor]:
    """Return a function that computes logits (n, vocab) of n tokens."""
    tested = ModelUnderTest.open(model, placement=placement)
    logits = cache(ReferenceModel(tested.config, tested.weights(torch.device("cpu")), torch.float64).logits)
    return lambda ids: logits(tuple(ids))


def assert_right(logits_of: Callable[[list[int]], Tensor], outputs: Sequence[Any]) -> None:
    """Check that every token is the likeliest one, with the log-probability that vLLM reports."""
    for output in outputs:
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        taken = torch.tensor(completion.token_ids)
        assert len(taken), "nothing was generated"
        logits = logits_of([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        best = logits.topk(2, dim=-1)
        margin = (best.values[:, 0] - best.values[:, 1]).min()
        wrong = (taken != best.indices[:, 0]).nonzero().flatten().tolist()
        about = f"after a prompt of {len(prompt)} tokens, smallest margin {margin:.2g}"
        assert not wrong, f"tokens {wrong} of {len(taken)} are wrong {about}"
        said = torch.tensor(
            [row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        )
        off = (said - logits.log_softmax(-1).gather(1, taken[:, None])[:, 0]).abs().max()
        assert off <= TOLERANCE, f"log-probabilities are off by {off:.2g} {about}"


def assert_right_with_drafts(folder: Path, options: dict[str, Any]) -> None:
    """Check tokens with drafts; some continuations repeat, so that drafts are accepted."""
    rng = random.Random(1)
    pattern = prompts_of(6, seed=8)[0]
    prompts = [*prompts_of(*LENGTHS), pattern * 12, [*pattern, *pattern], [7] * 30]
    prompts += [[rng.choice((3, 4)) for _ in range(50)] for _ in range(2)]
    with running(folder, **options) as llm:
        assert not ON_CPU or not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        assert_right(oracle(folder), generate(llm, prompts, 60))
        drafted, accepted = (metric(llm, f"spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
    assert 0 < accepted < drafted


def assert_right_in_a_process(folder: Path, options: dict[str, Any], environment: Mapping[str, str] = {}) -> str:
    """Run `main` of the model by itself; returns what it has said."""
    result = subprocess.run(
        [sys.executable, "-m", "vllm_plugin.plugin_helpers", folder, json.dumps(options)],
        env={**os.environ, **ENVIRONMENT, **environment, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "right", said
    return said


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def watched(llm: Any) -> Iterator[list[Mapping[str, int]]]:
    """Record the tokens of each request in each step inside a `with` block."""
    scheduler, steps = scheduler_of(llm), []
    schedule = scheduler.schedule

    def noted(*args: Any, **options: Any) -> Any:
        output = schedule(*args, **options)
        if output.total_num_scheduled_tokens:
            steps.append(dict(output.num_scheduled_tokens))
        return output

    scheduler.schedule = noted
    try:
        yield steps
    finally:
        scheduler.schedule = schedule


def metric(llm: Any, name: str) -> float:
    """Return the value of a counter of the engine."""
    return sum(found.value for found in llm.get_metrics() if found.name == f"vllm:{name}")


def demo_questions(count: int) -> tuple[list[Question], list[list[int]]]:
    """Return held-out questions of every kind with their tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    asked = held_out(count)
    return asked, [tokenizer.encode(question.prompt).ids for question in asked]


def main(model: Path, options: dict[str, Any], placements: Sequence[str] = ()) -> None:
    """Check the model in a process of its own: with several ranks vLLM starts more of them.

    A supernet is checked under all `placements`, one after the other.
    """
    if "speculative_config" in options:
        assert_right_with_drafts(model, options)
        print("right")
        return
    if placements:
        from lamella.vllm_plugin.placement import set_placement

        with running(model, **options) as llm:
            for placement in (*placements, placements[0]):
                set_placement(llm, placement)
                assert_right(oracle(model, placement), generate(llm, prompts_of(*LENGTHS), 12))
        print("right")
        return
    with running(model, **options) as llm:
        for _ in range(2):
            assert_right(oracle(model), generate(llm, prompts_of(*LENGTHS), 12))
    print("right")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
