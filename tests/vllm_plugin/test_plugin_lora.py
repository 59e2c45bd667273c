"""LoRA adapters on GPUs: a request with an adapter equals a model with the adapter merged into its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_plugin.plugin_helpers import LENGTHS, ON_CPU, canon, oracle, prompts_of, running

pytest.importorskip("vllm", reason="vLLM is not installed")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ON_CPU, reason="vLLM's adapters are wrong on CPUs: refused")]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16


def adapter(model: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """Return a random PEFT adapter for every projection of a checkpoint, and the merged checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    weights, parts = load_file(model / "model.safetensors"), {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(PROJECTIONS):
            down, up = (
                torch.randn(shape, generator=generator) * 0.1
                for shape in ((RANK, weight.shape[1]), (weight.shape[0], RANK))
            )
            parts |= {f"base_model.model.{module}.lora_{side}.weight": part for side, part in (("A", down), ("B", up))}
            weights[name] = weight + ALPHA / RANK * up @ down
    files, merged = folder / "adapter", folder / "merged"
    for path in (files, merged):
        path.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": PROJECTIONS, "bias": "none"}
    (files / "adapter_config.json").write_text(json.dumps(settings))
    save_file(parts, files / "adapter_model.safetensors")
    (merged / "config.json").write_text((model / "config.json").read_text())
    save_file(weights, merged / "model.safetensors")
    return files, merged


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_requests_with_and_without_an_adapter_in_one_batch(tmp_path: Path, eager: bool) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model = canon(tmp_path / "base")
    made = [adapter(model, tmp_path / str(seed), seed) for seed in (1, 2)]
    merged = [model, *(folder for _, folder in made)]
    loras = [None, *(LoRARequest(str(seed), seed, str(files)) for seed, (files, _) in enumerate(made, start=1))]
    prompts, greedy = prompts_of(*LENGTHS), SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)
    # vLLM's products with adapters have no float32.
    options = {"dtype": "float16", "enforce_eager": eager, "enable_lora": True, "max_loras": 2}
    with running(model, max_num_batched_tokens=64, **options) as llm:
        for _ in range(2):
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False,
                lora_request=[loras[index % 3] for index in range(len(prompts))],
            )  # fmt: skip
            for index, output in enumerate(outputs):
                off = [distance(oracle(folder), output) for folder in merged]
                assert off[index % 3] < 0.05
                assert all(other > 1 for at, other in enumerate(off) if at != index % 3)


def distance(logits_of: Callable[[list[int]], Tensor], output: Any) -> float:
    """Return the largest difference of vLLM's log-probabilities from the reference, in nats."""
    completion = output.outputs[0]
    logits = logits_of([*output.prompt_token_ids, *completion.token_ids])[len(output.prompt_token_ids) - 1 : -1]
    said = [row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    taken = torch.tensor(completion.token_ids)[:, None]
    return float((torch.tensor(said) - logits.log_softmax(-1).gather(1, taken)[:, 0]).abs().max())
