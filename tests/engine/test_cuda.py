"""Engine on a GPU: graphs, padding, asynchronous scheduling, and the kernel self-check."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apriel2_models import SUPERNET, fixed, pattern
from apriel2_models import checkpoint as apriel2_checkpoint
from helpers import canon_checkpoint, hf_checkpoint, random_prompts
from image_models import expected as expected_of_images
from image_models import image, image_checkpoint, image_prompt
from lamella import LLM, SamplingParams
from lamella.engine.steps import runner
from lamella.errors import KernelError
from lamella.ops.self_check import self_check
from models.test_llama4 import SHAPE as LLAMA4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = random_prompts([1, 2, 5, 17, 40, 130, 3, 33, 64, 9])
MIXED = ("all-gdn", "mamba,attention,kda", "swa,attention,gdn")  # placements of requests of one batch
SCORED = SamplingParams(temperature=0, max_tokens=24, logprobs=3, prompt_logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module", params=["canon", "qwen3", "llama4", "apriel2"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "canon":
        return canon_checkpoint(folder, hidden_size=256, intermediate_size=384, head_dim=64, canon_bias=True)
    if request.param == "apriel2":
        return apriel2_checkpoint(folder, pattern(["attention", "gdn", "kda", "mamba", "sliding_window"]))
    from transformers import Llama4TextConfig, Qwen3Config

    if request.param == "llama4":  # whose chunks end in prompts and in decodes
        shape = {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256}
        hf_checkpoint(folder, Llama4TextConfig(**LLAMA4 | shape | {"intermediate_size": 128, "num_experts_per_tok": 2}))
        return folder
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
    )
    hf_checkpoint(folder, config)
    return folder


def engine(folder, **options):
    # As many blocks as any test needs: by default an engine takes all memory, and tests could not share a GPU.
    llm = LLM(folder, **{"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 16, "num_blocks": 512, **options})
    llm.engine.memory.poison()
    return llm


def everything(outputs):
    return [(c.token_ids, c.logprobs, c.finish_reason) for out in outputs for c in out.outputs]


def tokens(outputs):
    return [out.outputs[0].token_ids for out in outputs]


def test_graphs_are_bitwise_equal_to_eager(checkpoint):
    expected = engine(checkpoint, enforce_eager=True).generate(PROMPTS, SCORED, use_tqdm=False)
    outputs = engine(checkpoint).generate(PROMPTS, SCORED, use_tqdm=False)
    assert everything(outputs) == everything(expected)
    assert [out.prompt_logprobs for out in outputs] == [out.prompt_logprobs for out in expected]


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_padding_changes_nothing_but_rounding(checkpoint, count):
    """Real rows give equal results beside padding rows and beside other requests, in a step with as many rows."""
    full = {1: 1, 3: 3, 5: 8, 7: 8}[count]
    llm = engine(checkpoint, max_num_batched_tokens=512)
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=0, ignore_eos=True)
    prompts = random_prompts([30] * full, seed=5)
    together = everything(llm.generate(prompts, params, use_tqdm=False))[:count]
    # With fewer requests, matrix products have other sizes, and may round differently.
    llm.reset_prefix_cache()
    fewer = everything(llm.generate(prompts[:count], params, use_tqdm=False))
    for (tokens, logprobs, _), (others, other_logprobs, _) in zip(together, fewer, strict=True):
        assert tokens == others
        for mine, theirs in zip(logprobs, other_logprobs, strict=True):
            assert next(iter(mine.values())).logprob == pytest.approx(next(iter(theirs.values())).logprob, abs=0.05)


def test_sampling_in_graphs_equals_eager_sampling(checkpoint):
    params = [
        SamplingParams(
            temperature=0.5 + 0.1 * i, top_k=i * 5, top_p=1 - 0.05 * i, min_p=0.001 * i, seed=i, max_tokens=30
        )
        for i in range(len(PROMPTS))
    ]
    expected = engine(checkpoint, enforce_eager=True).generate(PROMPTS, params, use_tqdm=False)
    graphs = engine(checkpoint)
    for _ in range(2):
        assert everything(graphs.generate(PROMPTS, params, use_tqdm=False)) == everything(expected)


def test_requests_with_processed_logits_or_logprobs_in_graphs(checkpoint):
    params = [
        SCORED,
        SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3),
        SamplingParams(temperature=0.9, seed=2, max_tokens=15, stop_token_ids=list(range(0, 128, 3))),
        SamplingParams(temperature=1.0, seed=4, max_tokens=22, logit_bias={5: 4.0}, logprobs=1),
        SamplingParams(temperature=0, max_tokens=18, min_tokens=6, stop_token_ids=list(range(128))),
        SamplingParams(temperature=1.5, seed=3, top_k=30, top_p=0.8, max_tokens=25, n=3),
    ]
    prompts = PROMPTS[: len(params)]
    expected = everything(engine(checkpoint, enforce_eager=True).generate(prompts, params, use_tqdm=False))
    llm = engine(checkpoint)
    assert everything(llm.generate(prompts, params, use_tqdm=False)) == expected
    assert llm.stats()["blocks_used"] == 0


def test_preemption_and_prefixes_with_graphs(checkpoint):
    options = dict(block_size=4, num_blocks=60, max_num_batched_tokens=64)
    expected = engine(checkpoint, enforce_eager=True).generate(PROMPTS[::-1], SCORED, use_tqdm=False)
    llm = engine(checkpoint, **options)
    for _ in range(2):
        outputs = llm.generate(PROMPTS[::-1], SCORED, use_tqdm=False)
        for ours, theirs in zip(outputs, expected, strict=True):
            mine, other = (
                [next(iter(row.values())).logprob for row in out.outputs[0].logprobs[:1]] for out in (ours, theirs)
            )
            assert mine == pytest.approx(other, abs=0.1)
    assert llm.stats()["preemptions"] > 0


def test_device_computes_while_the_host_processes(checkpoint):
    llm = engine(checkpoint)
    runner, events = llm.engine.runner, []
    launch, collect = runner.launch, runner.collect
    runner.launch = lambda step: events.append("launch") or launch(step)
    runner.collect = lambda step: events.append("collect") or collect(step)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        llm.generate(PROMPTS[:1], params, use_tqdm=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert events == ["launch", *["launch", "collect"] * 4, "collect"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_pass_their_check(dtype):
    self_check(dtype, torch.device("cuda"))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "short_conv"])
def test_wrong_kernel_fails_the_self_check(checkpoint, monkeypatch, name):
    from importlib import import_module

    module = import_module(f"lamella.ops.{name}.triton")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: right(*args, **kwargs) * 1.5)
    with pytest.raises(KernelError, match=f"^{name}: the GPU kernel differs from its reference by .* refusing to run"):
        engine(checkpoint)


class TestPlacements:
    """Placements of a supernet: each has its own graphs."""

    @pytest.fixture(scope="class")
    def supernet(self, tmp_path_factory):
        return apriel2_checkpoint(tmp_path_factory.mktemp("supernet"), fixed(SUPERNET, layers=3))

    def test_switch_keeps_graphs_and_isolates_state(self, supernet):
        placements = ("all-gdn", "mamba,attention,kda", "swa,attention,sliding_window")
        params = SamplingParams(temperature=0, max_tokens=16, logprobs=2, ignore_eos=True)
        options = {"enable_prefix_caching": False, "num_blocks": 128}
        alone = {
            placement: everything(
                engine(supernet, placement=placement, **options).generate(PROMPTS, params, use_tqdm=False)
            )
            for placement in placements
        }
        llm = engine(supernet, **options)
        for placement in (*placements, *placements):
            llm.set_placement(placement)
            before = llm.stats()["graph_steps"]
            assert everything(llm.generate(PROMPTS, params, use_tqdm=False)) == alone[placement]
            assert llm.stats()["graph_steps"] > before

    def test_requests_of_several_placements(self, supernet):
        """Requests of different placements in one batch get their own tokens, up to near-ties; in graphs that are
        captured while steps are in flight, and again in replays of these."""
        llm = engine(supernet, mixed_placements=True, dtype="float32", enable_prefix_caching=False)
        for names in (MIXED[:2], MIXED, MIXED[1:]):
            params = [
                SamplingParams(
                    temperature=0, max_tokens=12 + index, ignore_eos=True, placement=names[index % len(names)]
                )
                for index in range(len(PROMPTS))
            ]
            alone = [
                tokens(llm.generate(prompt, param, use_tqdm=False))
                for prompt, param in zip(PROMPTS, params, strict=True)
            ]
            for _ in range(2):
                before = llm.stats()["graph_steps"]
                mixed = tokens(llm.generate(PROMPTS, params, use_tqdm=False))
                assert mixed == [one for (one,) in alone]
                assert llm.stats()["graph_steps"] - before >= 12

    @pytest.mark.parametrize("temperature", [0, 0.8])
    def test_mixed_steps_with_and_without_graphs(self, supernet, temperature):
        """Row selection in a graph and division of an eager batch give equal results, up to rounding."""
        params = [
            SamplingParams(
                temperature=temperature, seed=index, top_p=0.9, max_tokens=20, logprobs=2, ignore_eos=True,
                placement=MIXED[index % 3],
            )
            for index in range(len(PROMPTS))
        ]  # fmt: skip
        options = {"mixed_placements": True, "dtype": "float32", "enable_prefix_caching": False}
        expected = engine(supernet, enforce_eager=True, **options).generate(PROMPTS, params, use_tqdm=False)
        llm = engine(supernet, **options)
        found = llm.generate(PROMPTS, params, use_tqdm=False)
        assert llm.stats()["graph_steps"] > 0
        assert tokens(found) == tokens(expected)
        for one, other in zip(found, expected, strict=True):
            for mine, theirs in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
                token = next(iter(mine))
                assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=2e-3)

    def test_graphs_of_different_mixer_sets_do_not_interfere(self, supernet, monkeypatch):
        """Graphs of different mixer sets share memory and give bitwise equal results, with more sets than are kept."""
        monkeypatch.setattr(runner, "_KEPT_GRAPHS", 2)
        llm = engine(supernet, mixed_placements=True, enable_prefix_caching=False)
        sets = (MIXED[:2], MIXED[1:], MIXED, MIXED[::2])
        first = {}
        for names in sets * 3:
            params = [
                SamplingParams(
                    temperature=0, max_tokens=16, logprobs=2, ignore_eos=True, placement=names[index % len(names)]
                )
                for index in range(len(PROMPTS))
            ]
            before = llm.stats()["graph_steps"]
            found = everything(llm.generate(PROMPTS, params, use_tqdm=False))
            assert found == first.setdefault(names, found)
            assert llm.stats()["graph_steps"] > before
            assert len(llm.engine.runner._graphs) <= 2

    def test_graph_serves_any_order_of_requests(self, supernet):
        """The union of mixers selects the graph, so another order of requests captures nothing."""
        llm = engine(supernet, mixed_placements=True, dtype="float32", enable_prefix_caching=False)
        results = []
        for names in (MIXED[:2], MIXED[1::-1]):
            params = [
                SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, placement=names[index % 2])
                for index in range(2)
            ]
            prompts = [PROMPTS[4 + index] for index in (range(2) if names == MIXED[:2] else (1, 0))]
            results.append(tokens(llm.generate(prompts, params, use_tqdm=False)))
            assert len(llm.engine.runner._graphs) == 2  # with the engine's default placement
        assert results[0] == results[1][::-1]


def test_images(tmp_path):
    """Images in chunks that end inside them, beside decodes in graphs, and after prefix hits."""
    model = image_checkpoint(tmp_path)
    llm = engine(tmp_path, dtype="float32", max_num_batched_tokens=16, block_size=16)
    prompts = [image_prompt(image("2 x 2", seed), image("1 x 3", seed)) for seed in range(3)] * 2
    outputs = llm.generate(prompts, SCORED, use_tqdm=False)
    again = llm.generate(prompts, replace(SCORED, prompt_logprobs=None), use_tqdm=False)
    assert all(output.num_cached_tokens for output in again)
    for prompt, *both in zip(prompts, outputs, again, strict=True):
        tokens, logits_of = expected_of_images(model, prompt)
        for output in both:
            ids = output.prompt_token_ids + output.outputs[0].token_ids
            with torch.no_grad():
                rows = logits_of(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
            theirs = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            found = [*(output.prompt_logprobs or [None] * len(tokens))[1:], *output.outputs[0].logprobs]
            for token, row, their in zip(ids[1:], found, theirs, strict=True):
                assert row is None or abs(row[token].logprob - float(their)) < 2e-3
