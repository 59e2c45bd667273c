"""No kernel reads memory before its wait that an unfinished launch may write, in a step of any kind of model."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the detector needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from dependent_launches import Detector, detect_races

import apriel2_models as apriel2
from helpers import canon_checkpoint, poisoned_llm, randomize, save_lamella
from image_models import TEXT
from lamella import LLM, SamplingParams, register_architecture
from lamella.config import AttentionConfig, CanonConfig
from lamella.layers.kernel_attention import use_attention_kernels
from lamella.models import Apriel2ForCausalLM, registry
from lamella.ops import backend
from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.launch import start_successor, wait, wait_for_predecessor
from mixed_steps import fake_graphs, mixed_llm, with_graphs

# Every module with kernels, so that all of them are there to be patched.
for op in (
    "attention.triton attention.triton_decode_few attention.triton_prefill delta_rule.triton gated_rms_norm.triton "
    "linear.triton moe.triton qkv.triton rms_norm.triton rotary.triton sampling.triton sampling.triton_placeholders "
    "selective_scan.triton short_conv.triton swiglu.triton"
).split():
    __import__(f"lamella.ops.{op}")

WIDE = 272  # from more than 256 channels on, a norm and the convolution behind it are one kernel
OTHER_BASE = {**apriel2.ATTENTION, "rotary": {"type": "mistral_1d", "theta": 500.0}}
NO_ROTATION = {**apriel2.ATTENTION, "rotary": {"type": "none"}}
MIXERS = {**apriel2.MIXERS, "other base": OTHER_BASE, "no rotation": NO_ROTATION}
SUPERNET = {**apriel2.SUPERNET, "mixers": {**apriel2.MIXERS, "other": OTHER_BASE}}
PLACEMENTS = {
    "supernet": ["attention,other,gdn", "other,kda,attention", "mamba,sliding_window,mamba"],
    "canon supernet": ["attention,other", "other,attention"],
}
KINDS = {
    "two rope bases": ["attention", "other base", "attention"],
    "no rotation first": ["no rotation", "attention"],
    "hybrid": ["gdn", "attention", "sliding_window", "kda", "mamba"],
    "recurrent first": ["mamba", "kda", "gdn"],
}


@pytest.fixture(scope="module", autouse=True)
def only_here():
    """Register the supernet with convolutions during these tests."""
    yield
    registry._targets.pop("CanonSupernetForCausalLM", None)


def use_kernels(monkeypatch):
    """Use lamella's GPU kernels for CPU tensors."""
    monkeypatch.setattr(backend, "platform", lambda x: "triton")


def llama4_checkpoint(folder):
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    # Layers 0 to 2 rotate and see chunks, layer 3 does neither and has temperatures.
    model = Llama4ForCausalLM(Llama4TextConfig(**TEXT, attn_temperature_tuning=True)).eval()
    randomize(model, 0)
    model.save_pretrained(folder)
    return folder


class CanonSupernetForCausalLM(Apriel2ForCausalLM):
    """Supernet with canons before its mixers and after the projections of its attention."""

    checkpoint_names: ClassVar = {**Apriel2ForCausalLM.checkpoint_names, "mixer_canon": "conv", "canon": "conv"}

    @classmethod
    def read_config(cls, config):
        model = super().read_config(config)
        canon = CanonConfig(kernel=4)

        def convolved(layer):
            mixers = tuple(
                (name, replace(mixer, canon=canon) if isinstance(mixer, AttentionConfig) else mixer)
                for name, mixer in layer.mixer.mixers
            )
            return replace(layer, mixer=replace(layer.mixer, mixers=mixers), mixer_canon=canon)

        return replace(model, layers=tuple(convolved(layer) for layer in model.layers))


def canon_supernet_checkpoint(folder):
    values = apriel2.fixed(SUPERNET, layers=2) | {"architectures": ["CanonSupernetForCausalLM"], "hidden_size": WIDE}
    register_architecture("CanonSupernetForCausalLM", CanonSupernetForCausalLM)
    model = CanonSupernetForCausalLM.from_config(values)
    randomize(model, 0)
    return save_lamella(model, values, folder)


def checkpoint_of(kind, folder):
    if kind == "canon supernet":
        return canon_supernet_checkpoint(folder)
    if kind == "canon":
        return canon_checkpoint(folder, hidden_size=WIDE)
    if kind == "canon with norms":
        return canon_checkpoint(folder, hidden_size=WIDE, qk_norm=True)
    if kind == "llama 4":
        return llama4_checkpoint(folder)
    if kind == "supernet":
        return apriel2.checkpoint(folder, apriel2.fixed(SUPERNET, layers=3))
    return apriel2.checkpoint(folder, apriel2.pattern(KINDS[kind], MIXERS))


def run(llm: LLM, monkeypatch, lengths, placements, later=()) -> Detector:
    """Generate after prompts of these lengths; add `later` requests after a few steps."""
    use_kernels(monkeypatch)
    use_attention_kernels(llm.engine.model)
    runner = llm.engine.runner
    runner.attention = runner.inputs.attention = AttentionSpace(8, 128, torch.device("cpu"))

    def job(index, length):
        prompt = {"prompt_token_ids": [(7 * index + j) % 100 + 3 for j in range(length)]}
        placement = placements[index % len(placements)]
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, placement=placement)
        return llm.engine.make_job(str(index), prompt, params)

    with detect_races(monkeypatch) as detector:
        jobs = [job(index, length) for index, length in enumerate(lengths)]
        for each in jobs:
            llm.engine.add(each)
        for _ in range(2):
            llm.engine.step()
        jobs += [job(len(lengths) + index, length) for index, length in enumerate(later)]
        for each in jobs[len(lengths) :]:
            llm.engine.add(each)
        while llm.engine.has_work:
            llm.engine.step()
    assert all(each.finished for each in jobs)
    return detector


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["canon", "canon with norms", "llama 4", *KINDS])
def test_decodes_prompts_and_mixed_steps_have_no_race(kind, dtype, tmp_path, monkeypatch):
    options = {"dtype": dtype, "max_num_batched_tokens": 32, "max_num_seqs": 4, "num_blocks": 64}
    llm = poisoned_llm(checkpoint_of(kind, tmp_path), enable_prefix_caching=False, **options)
    detector = run(llm, monkeypatch, (1, 2), [None], later=(5,))
    assert not detector.hazards
    assert detector.launches["_decode_kernel" if "canon" in kind else "_decode_prepared"] or kind == "recurrent first"
    assert detector.launches["_norm_step"] or "canon" not in kind
    assert len(detector.launches) >= 6


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", ["supernet", "canon supernet"])
def test_mixed_placements_have_no_race(kind, graphs, tmp_path, monkeypatch):
    """With gathered batches, and with masked batches as in graphs."""
    if graphs:
        fake_graphs(monkeypatch)
        monkeypatch.setattr("lamella.engine.steps.graphs._WARM_UPS", 0)
    llm = mixed_llm(checkpoint_of(kind, tmp_path), dtype="bfloat16", max_num_seqs=2 if graphs else 4)
    llm = with_graphs(llm) if graphs else llm
    detector = run(llm, monkeypatch, (1, 2), PLACEMENTS[kind], later=() if graphs else (4,))
    assert not detector.hazards
    assert detector.launches["_angles"] and detector.launches["_decode_prepared"]
    assert detector.launches["_norm_step"] or kind == "supernet"
    assert not graphs or llm.engine.runner.num_replays


@triton.jit
def _produce(out, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    tl.store(out, 1.0)


@triton.jit
def _pass(out, EARLY: tl.constexpr, PDL: tl.constexpr):
    if EARLY:
        start_successor(PDL)
        wait(PDL)
    else:
        wait_for_predecessor(PDL)
    tl.store(out, 2.0)


@triton.jit
def _consume(x, out, EARLY: tl.constexpr, PDL: tl.constexpr):
    if EARLY:
        value = tl.load(x)
        wait_for_predecessor(PDL)
    else:
        wait_for_predecessor(PDL)
        value = tl.load(x)
    tl.store(out, value)


@triton.jit
def _write_early(out, PDL: tl.constexpr):
    tl.store(out, 3.0)
    wait_for_predecessor(PDL)


@triton.jit
def _never_wait(out, PDL: tl.constexpr):
    start_successor(PDL)


RACE = "_consume: reads x before its wait, which {} writes"


@pytest.mark.parametrize(
    ("producer", "between", "early", "expected"),
    [
        ("dependent", [], True, [RACE.format("_produce")]),
        ("dependent", [], False, []),
        ("dependent", [False], True, []),
        ("dependent", [True], True, [RACE.format("_produce")]),
        ("dependent", [True, True], True, [RACE.format("_produce")]),
        ("dependent", [False, True], True, []),
        ("plain", [], True, [RACE.format("aten::fill_.Scalar")]),
        ("plain", [], False, []),
        ("plain", [True], True, [RACE.format("aten::fill_.Scalar")]),
        ("plain", [False], True, []),
    ],
)
def test_detector_knows_which_launches_may_be_unfinished(producer, between, early, expected, monkeypatch):
    x, other, out = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    with detect_races(monkeypatch) as detector:
        if producer == "dependent":
            _produce[(1,)](x, PDL=True)
        else:
            x.fill_(1.0)
        for starts_early in between:
            _pass[(1,)](other, EARLY=starts_early, PDL=True)
        _consume[(1,)](x, out, EARLY=early, PDL=True)
    assert list(detector.hazards) == expected and out.item() == 1.0


def test_detector_sees_writes_before_the_wait_and_kernels_that_never_wait(monkeypatch):
    with detect_races(monkeypatch) as detector:
        _write_early[(1,)](torch.zeros(1), PDL=True)
        _never_wait[(1,)](torch.zeros(1), PDL=True)
    assert list(detector.hazards) == ["_write_early: writes before its wait", "_never_wait: no program waits"]
