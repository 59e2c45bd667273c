"""Shapes of dense models on a GPU, and the workloads that engines are compared on."""

from __future__ import annotations

import random
import statistics
from typing import Any

from common.prompts import random_tokens
from common.timing import Run

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    },
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
CANON = {"architectures": ["LlamaCanonForCausalLM"], "model_type": "LlamaCanon", "canon_set": "ABCD"}
MAX_MODEL_LEN = 4096
DECODE_TOKENS = 256
PROMPT_TOKENS = 128


def config(name: str) -> dict[str, Any]:
    """Return the config of a shape. A name that ends with "+canon" has all four convolutions (and not Qwen3's norm)."""
    base = SHAPES[name.removesuffix("+canon")]
    return base | CANON if name.endswith("+canon") else base


def workloads(run: Run) -> dict[str, float]:
    """Run all workloads and return the figures by name."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return random_tokens(rng, count, 10000)

    run([[1, 2, 3]], [8])
    prompt = [tokens(PROMPT_TOKENS)]
    # Medians of each: the time of the prompt varies by more than the time of the steps.
    times = [(run(prompt, [1 + DECODE_TOKENS]), run(prompt, [1])) for _ in range(7)]
    decode = (
        statistics.median(long for long, _ in times) - statistics.median(short for _, short in times)
    ) / DECODE_TOKENS
    prompts = [tokens(rng.randint(100, 1024)) for _ in range(256)]
    lengths = [rng.randint(100, 1024) for _ in range(256)]
    offline = sum(lengths) / run(prompts, lengths)
    prompts = [tokens(2048) for _ in range(32)]
    prefill = max(32 * 2048 / run(prompts, [1] * 32) for _ in range(2))
    return {
        "decode_b1_ms": round(decode * 1e3, 4),
        "offline_tok_s": round(offline),
        "prefill_tok_s": round(prefill),
    }
