"""Models in vLLM by the plugin: greedy tokens equal those of one full float64 forward, for any chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from checkpoint.test_lingua import lingua_checkpoint
from helpers import VOCAB, hf_checkpoint
from lamella.demo import CHECKPOINT
from lamella.demo.questions import END, VOCABULARY, is_right
from lamella.parity import compare
from lamella.vllm_plugin import compat
from vllm_plugin.plugin_helpers import (
    LENGTHS,
    NGRAM,
    ON_CPU,
    ROOM,
    SHAPE,
    assert_right,
    assert_right_in_a_process,
    assert_right_with_drafts,
    canon,
    demo_questions,
    generate,
    metric,
    oracle,
    prompts_of,
    running,
    tokens_of,
    watched,
)

pytest.importorskip("vllm", reason="vLLM is not installed")

BLOCK = 32
MODELS = {
    "everything": {},
    "AC, activation": {"canon_set": "AC", "canon_activation": True, "canon_residual": False},
    "lingua rotation": {"rope_version": "lingua", "canon_kernel": 3, "tie_word_embeddings": True},
}
sound_speculation = pytest.mark.skipif(not compat.has_sound_speculation(), reason="this vLLM's speculation is refused")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: canon(tmp_path_factory.mktemp("canon"), **changes) for name, changes in MODELS.items()}
    changes = SHAPE | {"qk_norm": True, "rope_dim": 8, "rope_version": "lingua"}
    made["lingua files"] = lingua_checkpoint(tmp_path_factory.mktemp("lingua"), **changes)
    return made


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["everything"]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("everything", {"enable_prefix_caching": False}),
        ("everything", {"max_num_batched_tokens": 64}),
        ("everything", {"max_num_batched_tokens": 5, "max_num_seqs": 5, "enable_prefix_caching": False}),
        ("AC, activation", {"max_num_batched_tokens": 5, "max_num_seqs": 5, "enable_prefix_caching": False}),
        ("lingua rotation", {"max_num_batched_tokens": 7, "max_num_seqs": 5, "enable_prefix_caching": False}),
        ("lingua files", {"max_num_batched_tokens": 64, "config_format": "lamella", "load_format": "lamella"}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("max_num_batched_tokens", "whole")),
)
def test_prompts_in_one_batch_with_any_chunks(folders: dict[str, Path], model: str, options: dict[str, Any]) -> None:
    with running(folders[model], **options) as llm, watched(llm) as steps:
        assert_right(oracle(folders[model]), generate(llm, prompts_of(*LENGTHS)))
    limit = options.get("max_num_batched_tokens")
    lengths = {count for step in steps for count in step.values()}
    if limit is None:
        assert lengths == set(LENGTHS)
    else:
        assert limit - BLOCK < max(sum(step.values()) for step in steps) <= limit
        assert any(1 in step.values() and max(step.values()) > 1 for step in steps)
    if limit == 5:
        assert lengths == {1, 2, 3, 4, 5}


def test_recycled_slots_do_not_leak(folder: Path) -> None:
    """Prompts of one token would reveal state of another request."""
    options = {"max_num_seqs": 4, "num_gpu_blocks_override": 24, "enable_prefix_caching": False}
    with running(folder, **options) as llm:
        for seed in range(4):
            prompts = prompts_of(1, 1, 30, 2, 1, 3, 7, 1, seed=seed)
            assert_right(oracle(folder), generate(llm, prompts, 8))


def test_cached_prefixes(folder: Path) -> None:
    base, other = prompts_of(150, 70, seed=3)
    shared = [[*base[:length], *prompts_of(9, seed=length)[0]] for length in (32, 64, 96, 33, 50, 128, 149)]
    with running(folder, enable_prefix_caching=True, max_num_batched_tokens=100) as llm:
        hits = []
        for prompts in ([base], [base, other], shared, shared, [*shared, base, other, base[:96], base[:1]]):
            outputs = generate(llm, prompts, 40)
            assert_right(oracle(folder), outputs)
            hits.append([output.num_cached_tokens for output in outputs])
    assert hits[0] == [0]
    assert hits[1][0] >= BLOCK and hits[1][1] == 0
    assert any(hits[2]) and sum(map(bool, hits[3])) >= 4
    assert all(hit % BLOCK == 0 for row in hits for hit in row) or not ON_CPU


def test_a_conversation_continues_on_its_own_answer(folder: Path) -> None:
    (prompt,) = prompts_of(20, seed=5)
    with running(folder, enable_prefix_caching=True) as llm:
        hits = []
        for _ in range(4):
            outputs = generate(llm, [prompt], 37)
            assert_right(oracle(folder), outputs)
            hits.append(outputs[0].num_cached_tokens)
            prompt = [*prompt, *tokens_of(outputs)[0], 3, 1]
    assert hits[-1] > 0


@pytest.mark.parametrize("caching", [True, False], ids=["prefixes", "no prefixes"])
def test_preempted_requests_begin_again(folder: Path, caching: bool) -> None:
    options = {"num_gpu_blocks_override": 30, "enable_prefix_caching": caching, "max_num_batched_tokens": 48}
    with running(folder, **options) as llm:
        outputs = generate(llm, prompts_of(*range(20, 44, 2), seed=7), 60)
        assert metric(llm, "num_preemptions") > 0
        assert_right(oracle(folder), outputs)


@pytest.mark.parametrize("model", ["everything", "AC, activation"])
@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
def test_compiled(folders: dict[str, Path], model: str, pieces: bool) -> None:
    compilation = {"cudagraph_mode": "FULL_AND_PIECEWISE"} if pieces else {"splitting_ops": []} if ON_CPU else {}
    options = {"enforce_eager": False, "max_num_batched_tokens": 64, "max_num_seqs": 5}
    options["compilation_config"] = compilation
    with running(folders[model], **options) as llm:
        for seed in range(2):
            assert_right(oracle(folders[model]), generate(llm, prompts_of(*LENGTHS, seed=seed)))


@sound_speculation
def test_drafts_beside_prompts_in_chunks(folder: Path) -> None:
    """In a process of its own: on an AMD EPYC a second engine with drafts in a process of one thread, as tests are,
    gives wrong tokens (vLLM 0.32); of two threads it does not."""
    options = {"speculative_config": NGRAM, "max_num_batched_tokens": 40, "max_num_seqs": 4}
    said = assert_right_in_a_process(folder, options)
    assert not ON_CPU or "prefix caching is off" in said


@sound_speculation
def test_drafts_from_the_prompt(folder: Path, plugin_log: pytest.LogCaptureFixture) -> None:
    assert_right_with_drafts(folder, {"speculative_config": NGRAM})
    assert not ON_CPU or "prefix caching is off" in plugin_log.text


@pytest.fixture(scope="module")
def questions() -> tuple[list[Any], list[list[int]]]:
    return demo_questions(24)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 16},
        {"num_gpu_blocks_override": 12, "max_num_seqs": 16, "enable_prefix_caching": False},
        pytest.param(
            {"max_num_batched_tokens": 5, "max_num_seqs": 5, "enable_prefix_caching": False}, marks=pytest.mark.slow
        ),
        {"enable_prefix_caching": True, "max_num_seqs": 16},
        {"enforce_eager": False},
        pytest.param({"speculative_config": NGRAM}, marks=sound_speculation),
    ],
    ids=["whole", "few blocks", "5 a step", "prefixes", "compiled", "drafts"],
)
def test_the_demo_answers_questions(questions: tuple[list[Any], list[list[int]]], options: dict[str, Any]) -> None:
    from vllm import SamplingParams

    asked, prompts = questions
    params = SamplingParams(temperature=0, max_tokens=60, logprobs=1)
    with running(CHECKPOINT, **options) as llm:
        for _ in range(2 if options.get("enable_prefix_caching") else 1):
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
            assert_right(oracle(CHECKPOINT), outputs)
        if "num_gpu_blocks_override" in options:
            assert metric(llm, "num_preemptions") > 0
        if "speculative_config" in options:
            assert metric(llm, "spec_decode_num_accepted_tokens") > 0
    said = [" ".join(VOCABULARY[token] for token in tokens) for tokens in tokens_of(outputs)]
    right = [is_right(question, text) for question, text in zip(asked, said, strict=True)]
    assert sum(right) >= 0.95 * len(right), [pair for pair in zip(asked, said, strict=True) if not is_right(*pair)]
    assert all(text.endswith(END) for text in said)


@pytest.mark.parametrize("model", ["demo", "random"])
def test_bfloat16_error_is_at_most_that_of_plain_torch(folder: Path, model: str) -> None:
    result = compare(
        CHECKPOINT if model == "demo" else folder,
        engine="vllm",
        reference="reference",
        dtype="bfloat16",
        prompts="random",
        count=6,
        prompt_len=48,
        decode_len=16,
        engine_options={"enforce_eager": True, "max_num_batched_tokens": 64, **ROOM},
    )
    assert result.noise_floor_ratio <= 1.0
    assert result.outliers["count"] == 0


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config], ids=["Llama", "Qwen3"])
def test_architectures_that_vllm_has_are_served_under_a_prefix(config: type, tmp_path: Path) -> None:
    model = hf_checkpoint(tmp_path, config(vocab_size=VOCAB, **SHAPE, max_position_embeddings=256))
    own = model.config.architectures[0]

    @torch.no_grad()
    def logits_of(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0]

    for architecture, module in ((own, "vllm."), (f"Lamella{own}", "lamella.")):
        with running(tmp_path, hf_overrides={"architectures": [architecture]}) as llm:
            (served,) = llm.apply_model(_module)
            assert served.startswith(module)
            assert_right(logits_of, generate(llm, prompts_of(*LENGTHS), 12))


def _module(model: torch.nn.Module) -> str:
    return type(model).__module__
