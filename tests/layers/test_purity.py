"""Layers do not change their inputs, in every dtype and on every path, and depend only on hidden + residual."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import Qwen3Config

from helpers import VOCAB, canon_checkpoint, hf_checkpoint, plain_logits, random_prompts
from lamella import LLM, SamplingParams
from lamella.checkpoint import load_model, open_checkpoint
from lamella.layers.canon import Canon
from lamella.layers.context import forward_batch
from lamella.layers.decoder import DecoderLayer, LanguageModel, plain_batch
from lamella.layers.norm import RMSNorm
from lamella.layers.rotary import Positions
from lamella.layers.state_modules import PagedAttention
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.rotary import rotate

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=["canon", "qwen3"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "canon":
        return canon_checkpoint(folder, qk_norm=True, canon_bias=True, attention_bias=True, rope_dim=8)
    shape = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_attention_heads": 4}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    hf_checkpoint(folder, Qwen3Config(vocab_size=VOCAB, num_hidden_layers=2, num_key_value_heads=2, **shape, **window))
    return folder


@pytest.fixture(params=["native", "portable"])
def path(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr("lamella.ops.backend.native.available", lambda: False)


@pytest.fixture
def watched(monkeypatch):
    """`watched(model)` checks every later call of a layer, norm or rotation; returns the set of called classes."""
    called = set()

    def checked(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            caller = type(args[0]) if isinstance(args[0], torch.nn.Module) else function
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            before = [value.clone() for value in inputs]
            result = function(*args, **kwargs)
            for now, then in zip(inputs, before, strict=True):
                assert torch.equal(now, then), f"{caller.__name__}.{function.__name__} changed its input"
            called.add(caller)
            return result

        return wrapper

    def watch(model):
        for cls in {base for module in model.modules() for base in type(module).__mro__}:
            if cls.__module__.startswith("lamella") and "forward" in vars(cls):
                monkeypatch.setattr(cls, "forward", checked(cls.forward))
        monkeypatch.setattr("lamella.layers.attention.rotate", checked(rotate))
        return called

    return watch


def everyone(model: LanguageModel) -> set[object]:
    """Return the classes that compute something in `model`, and the rotation."""
    classes = {type(module) for module in model.modules() if "forward" in dir(type(module))}
    return {cls for cls in classes if cls.__name__ not in ("ModuleList", "ConvHistory", "SlotStateModule")} | {rotate}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_forward_changes_no_input(checkpoint, path, watched, dtype):
    model = load_model(open_checkpoint(checkpoint), dtype=dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    called = watched(model)
    ids = torch.randint(0, VOCAB, (2, 30))
    assert plain_logits(model, ids).isfinite().all()
    assert called == everyone(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_changes_no_input(checkpoint, path, watched, dtype):
    llm = LLM(checkpoint, device="cpu", dtype=dtype, max_num_batched_tokens=16, max_num_seqs=3)
    model = llm.engine.model
    called = watched(model)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate(random_prompts([1, 3, 40]), params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [6, 6, 6]
    assert called == everyone(model)


def test_a_changed_input_is_detected(checkpoint, watched, monkeypatch):
    forward = PagedAttention.forward

    def careless(self, q, k, v):
        result = forward(self, q, k, v)
        q.mul_(2)
        return result

    monkeypatch.setattr(PagedAttention, "forward", careless)
    model = load_model(open_checkpoint(checkpoint))
    watched(model)
    with pytest.raises(AssertionError, match=r"PagedAttention\.\w+ changed its input"):
        plain_logits(model, torch.arange(5))


@torch.no_grad()
def test_layers_depend_only_on_the_sum_of_hidden_and_residual(checkpoint):
    """The split of the stream into hidden and residual has no effect, and a layer adds the outputs of its two parts."""
    model = load_model(open_checkpoint(checkpoint))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (20,), generator=generator)
    with forward_batch(plain_batch(ids)) as batch:
        positions = Positions(batch.ragged.positions)
        stream = model.model.embed_tokens(ids)
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            some = torch.randn(stream.shape, generator=generator)
            whole = layer(positions, torch.zeros_like(stream), stream)
            for split in ((stream, torch.zeros_like(stream)), (some, stream - some)):
                pair = layer(positions, *split)
                torch.testing.assert_close(sum(pair), sum(whole), atol=1e-4, rtol=1e-4)
            middle = stream + layer.mixer(positions, entry(stream, layer.mixer_norm, layer.mixer_canon))
            torch.testing.assert_close(whole[1], middle, atol=1e-5, rtol=1e-5)
            stream = middle + layer.feed_forward(entry(middle, layer.feed_forward_norm, layer.feed_forward_canon))
            torch.testing.assert_close(sum(whole), stream, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids), model.model.norm(stream), atol=1e-4, rtol=1e-4)


def entry(stream: torch.Tensor, norm: RMSNorm, canon: Canon | None) -> SublayerInput:
    return SublayerInput(torch.zeros_like(stream), stream, norm, canon)
