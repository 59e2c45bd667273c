"""A long life of `AsyncLLM`: thousands of requests with cancels, errors, early leaves and switches of the placement.

Every answer is the one that a request gets alone, or a clear error; memory stays flat, and the pools are empty at the
end.
`LAMELLA_SOAK_REQUESTS` sets the number for each kind of model (3,334, which makes 20,000 for six kinds).
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen3Config

import apriel2_models
from helpers import canon_checkpoint, hf_checkpoint
from lamella import LLM, AsyncLLM, LamellaError, SamplingParams

pytestmark = pytest.mark.slow
REQUESTS = int(os.environ.get("LAMELLA_SOAK_REQUESTS") or 3334)
TOKENS = 12
PROMPTS = 40
MEMORY = 300 << 20  # bytes by which a process may grow after its first tenth
OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 128,
    "num_blocks": 96,
    "max_num_seqs": 8,
    "block_size": 4,
}
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama4(folder: Path) -> None:
    from transformers import Llama4TextConfig

    config = Llama4TextConfig(
        **SIZES, head_dim=16, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=1, attention_chunk_size=16, no_rope_layers=[1, 0], use_qk_norm=True, pad_token_id=0,
    )  # fmt: skip
    hf_checkpoint(folder, config)


KINDS = {
    "llama": lambda folder: hf_checkpoint(folder, LlamaConfig(**SIZES)),
    "windows": lambda folder: hf_checkpoint(
        folder,
        Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=7,
                    layer_types=["full_attention", "sliding_attention"]),
    ),
    "canon": lambda folder: canon_checkpoint(folder, max_position_embeddings=256),
    "hybrid": lambda folder: apriel2_models.checkpoint(
        folder, apriel2_models.pattern(["attention", "gdn", "mamba", "sliding_window", "kda"])
    ),
    "supernet": lambda folder: apriel2_models.checkpoint(folder, apriel2_models.fixed(apriel2_models.SUPERNET, 2)),
    "llama4": llama4,
}  # fmt: skip
PLACEMENTS = ["all-attention", "all-gdn"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_right_or_a_clear_error(kind, tmp_path):
    KINDS[kind](tmp_path / "model")
    rng = random.Random(kind)
    beginnings = [[rng.randrange(3, 128) for _ in range(24)] for _ in range(4)]
    prompts = [
        rng.choice(beginnings)[: rng.randrange(1, 25)] + [rng.randrange(3, 128)] * rng.randrange(1, 9)
        for _ in range(PROMPTS)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    names = PLACEMENTS if kind == "supernet" else [None]
    expected = {}
    for name in names:
        alone = LLM(
            tmp_path / "model", **{**OPTIONS, "max_num_seqs": 1, "enable_prefix_caching": False}, placement=name
        )
        for index, prompt in enumerate(prompts):
            (output,) = alone.generate({"prompt_token_ids": prompt}, greedy, use_tqdm=False)
            expected[index, name] = output.outputs[0].token_ids
        alone.engine.close()
    counts = asyncio.run(live(tmp_path / "model", prompts, expected, names, rng))
    assert counts.pop("wrong") == 0 and counts.pop("unclear") == []
    assert min(counts.values()) > 0, counts
    print(kind, counts)


async def live(folder, prompts, expected, names, rng):
    engine = AsyncLLM(folder, **OPTIONS, placement=names[0])
    counts = {"right": 0, "left": 0, "cancelled": 0, "raised": 0, "refused": 0, "aborted": 0, "wrong": 0, "unclear": []}
    slots = asyncio.Semaphore(24)
    first_memory = 0

    async def one(number: int) -> None:
        index, act, after = rng.randrange(PROMPTS), rng.random(), rng.randrange(1, TOKENS)
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        prompt = {"prompt_token_ids": prompts[index]}
        if act < 0.05:
            prompt = {"prompt_token_ids": [10**6]}
        tokens, seen = [], 0
        try:
            async for output in engine.generate(prompt, params, request_id=f"r{number}"):
                tokens, seen = output.outputs[0].token_ids, seen + 1
                reason = output.outputs[0].finish_reason
                if 0.05 <= act < 0.12 and seen == after:
                    counts["left"] += 1
                    return
                if 0.12 <= act < 0.18 and seen == after:
                    raise KeyError("the caller's own")
                if 0.18 <= act < 0.24 and seen == after:
                    engine.abort(f"r{number}")
            if reason == "abort":
                counts["aborted"] += 1
                if not any(expected[index, name][: len(tokens)] == tokens for name in names):
                    counts["wrong"] += 1
            elif any(expected[index, name] == tokens for name in names):
                counts["right"] += 1
            else:
                counts["wrong"] += 1
        except KeyError:
            counts["raised"] += 1
        except LamellaError as error:
            counts["refused"] += 1
            if act >= 0.05 or "\n" in str(error):
                counts["unclear"].append(str(error))
        except asyncio.CancelledError:
            counts["cancelled"] += 1
        finally:
            slots.release()

    tasks = set()
    for number in range(REQUESTS):
        await slots.acquire()
        task = asyncio.create_task(one(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if rng.random() < 0.06:
            asyncio.get_running_loop().call_later(rng.random() * 0.02, task.cancel)
        if rng.random() < 0.01:
            engine.reset_prefix_cache()
        if len(names) > 1 and number % 400 == 399:
            await engine.set_placement(rng.choice(names))  # not "recompute": it keeps the output so far
        if number == REQUESTS // 10:
            gc.collect()
            first_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await asyncio.gather(*tasks, return_exceptions=True)
    for _ in range(200):
        await asyncio.sleep(0.05)  # requests whose tasks were cancelled are dropped by the engine's thread
        if not (engine.engine.has_work or engine._queues):
            break
    stats = engine.stats()
    assert stats["running"] == stats["waiting"] == stats["blocks_used"] == stats["slots_used"] == 0
    assert not engine._queues
    engine.engine.state.check_at_rest()
    engine.engine.state.check_integrity()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first_memory) * 1024 < MEMORY
    await asyncio.get_running_loop().run_in_executor(None, engine.shutdown)
    return counts
