"""Tiny random checkpoints and an oracle: what many tests start from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella import LLM, SamplingParams
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.names import targets
from lamella.checkpoint.tensors import INDEX
from lamella.models import resolve_architecture

VOCAB = 128
# Keys of a tiny model's config file that all architectures like Llama have.
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Weights large enough that every part matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "canon" in name:
            parameter.uniform_(-0.5, 0.5, generator=generator)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.15, generator=generator)


def save_lamella(model: nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """Write one of our models in its Hugging Face layout."""
    tensors = {
        name: target.parameter[target.start : target.stop].detach().clone(memory_format=torch.contiguous_format)
        for name, target in targets(model, type(model).checkpoint_names).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def canon_config(**changes: Any) -> dict[str, Any]:
    """A tiny LlamaCanon with everything that a test may change."""
    return {
        "architectures": ["LlamaCanonForCausalLM"],
        "model_type": "LlamaCanon",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "canon_set": "ABCD",
    } | changes


def canon_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random tiny LlamaCanon on disk."""
    config = canon_config(**changes)
    model = resolve_architecture("LlamaCanonForCausalLM").from_config(config)
    randomize(model, seed)
    return save_lamella(model, config, folder)


def shard(folder: Path, count: int = 3, index: bool = True) -> dict[str, str]:
    """Spread model.safetensors over files, with an index unless told; returns which tensor is in which file."""
    whole = folder / "model.safetensors"
    tensors, weight_map = load_file(whole), dict[str, str]()
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    whole.unlink()
    if index:
        write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Write the index of a folder's safetensors files."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_config(folder: Path, **changes: Any) -> None:
    """Write other values into a checkpoint's config.json; None removes a key."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(VOCAB) for _ in range(n)]} for n in lengths]


@torch.no_grad()
def greedy(logits_of: Callable[[Tensor], Tensor], prompt: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens, each from one full forward: `logits_of` ids (1, S) gives (1, S, V)."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def hf_checkpoint(folder: Path, config: Any, seed: int = 0) -> nn.Module:
    """A random `transformers` model, saved in `folder`; its logits are `model(ids).logits`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logprobs(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


@torch.no_grad()
def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a plain forward of one of our models."""
    return model.compute_logits(model(ids))


@torch.no_grad()
def assert_plain_parity(
    folder: Path, logits_of: Callable[[Tensor], Tensor], lengths: Sequence[int], max_length: int | None = None
) -> None:
    """A forward without an engine gives the oracle's log-probabilities."""
    model = load_model(open_checkpoint(folder), dtype="float32", max_length=max_length)
    for prompt in random_prompts(lengths):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        difference = logprobs(plain_logits(model, ids)) - logprobs(logits_of(ids))
        assert difference.abs().max() <= 1e-4


@torch.no_grad()
def assert_engine_parity(
    folder: Path, logits_of: Callable[[Tensor], Tensor], lengths: Sequence[int], count: int = 8, **options: Any
) -> None:
    """The chunking, batching engine gives the oracle's log-probabilities and its greedy tokens."""
    llm = LLM(folder, device="cpu", dtype="float32", max_num_batched_tokens=64, max_num_seqs=4, **options)
    prompts = random_prompts(lengths)
    params = SamplingParams(temperature=0, max_tokens=count, prompt_logprobs=VOCAB, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        ids = prompt["prompt_token_ids"]
        assert output.outputs[0].token_ids == greedy(logits_of, ids, count)
        if len(ids) > 1:
            ours = torch.tensor([[row[i].logprob for i in range(VOCAB)] for row in output.prompt_logprobs[1:]])
            expected = logprobs(logits_of(torch.tensor([ids])))[0, :-1]
            assert (ours - expected).abs().max() <= 1e-4


def poisoned_llm(folder: Path, **options: Any) -> LLM:
    """An engine whose pools hold NaN, and which checks its bookkeeping after every step."""
    llm = LLM(folder, device="cpu", **options)
    llm.engine.memory.poison()
    step = llm.engine.step

    def checked_step() -> Any:
        changed = step()
        llm.engine.state.check_integrity()
        return changed

    llm.engine.step = checked_step
    return llm
