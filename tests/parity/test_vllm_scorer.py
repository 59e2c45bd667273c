"""vLLM as a scorer of the parity kit: its numbers and its errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import canon_checkpoint, change_config, greedy, hf_checkpoint, logprobs
from lamella.errors import ConfigError, ParameterError
from lamella.parity import score
from lamella.parity.scorers import vllm as module
from lamella.parity.scorers.vllm import VllmScorer, open_scorer
from lamella.parity.scores import Settings
from lamella.parity.sequences import TokenSequence
from lamella.parity.tested_model import ModelUnderTest
from vllm_plugin.plugin_helpers import numba_hidden

pytestmark = pytest.mark.vllm
VOCAB, MAX_LEN = 250, 64  # a size that vLLM rounds up

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# vLLM's float32 attention on GPUs multiplies in TF32.
SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.2}
TOLERANCE = 2e-2 if DEVICE.type == "cuda" else 1e-3


def sequence(prompt: int, continuation: int, seed: int) -> TokenSequence:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (prompt + continuation,), generator=generator).tolist()
    return TokenSequence(tuple(ids[:prompt]), tuple(ids[prompt:]))


SEQUENCES = [sequence(1, 7, 0), sequence(21, 4, 1), sequence(5, 30, 2)]


@pytest.fixture(autouse=True, scope="module")
def vllm_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        yield


def checkpoint(architecture: str, folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the expected values are transformers'")
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LEN,
    )
    return hf_checkpoint(folder, config, seed=1)


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A scorer and the same model in `transformers`."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    model = checkpoint(request.param, folder)
    settings = Settings(dtype=torch.float32, device=DEVICE, batch_size=2, options=SMALL)
    with numba_hidden():
        scorer = open_scorer(ModelUnderTest.open(folder), settings)
        yield scorer, model
        scorer.close()


def expected(model: nn.Module, sequence: TokenSequence) -> Tensor:
    """Log-probabilities (N, V) of one full forward."""
    with torch.no_grad():
        return logprobs(model(torch.tensor([sequence.token_ids])).logits)[0, :-1]


def of_tokens(values: Tensor, sequence: TokenSequence) -> Tensor:
    return values.gather(1, torch.tensor(sequence.token_ids[1:])[:, None])[:, 0]


def test_errors_before_an_engine_starts() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with pytest.raises(ConfigError, match="device 'tpu': the installed vLLM runs on"):
        VllmScorer("nowhere", device="tpu")
    with pytest.raises(ConfigError, match="dtype, seed cannot be an option"):
        VllmScorer("nowhere", options={"seed": 1, "dtype": "float32", "enforce_eager": True})


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"^vLLM cannot be imported \(.*\): pip install 'lamella\[vllm\]'$"):
        VllmScorer("nowhere")
    with pytest.raises(AttributeError, match="ForcedToken"):
        module.ForcedToken  # noqa: B018


def test_forcing_by_slots() -> None:
    """The second model runner's interface: a row belongs to a slot, and how far it is follows from its length."""
    forcing = module._Forcing(None, SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([4, 9, 2, 3]))))
    assert forcing.add_request(3, SimpleNamespace(extra_args={module._FORCED: [5, 6]}))
    assert forcing.add_request(1, SimpleNamespace(extra_args={module._FORCED: [7]}))
    assert forcing.add_request(2, SimpleNamespace(extra_args={module._FORCED: [1]}))
    assert not forcing.add_request(2, SimpleNamespace(extra_args=None))  # the slot's next request
    logits = torch.arange(32.0).view(4, 8)
    context = SimpleNamespace(
        idx_mapping_np=np.array([2, 3, 1, 0]),
        seq_lens_upper_bound_np=np.array([3, 4, 8, 5, 0]),  # padded; slot 1 is amid its prompt
    )
    forced = forcing.apply(logits.clone(), context)
    assert torch.equal(forced[[0, 2, 3]], logits[[0, 2, 3]])
    assert forced[1].isfinite().nonzero().tolist() == [[6]]


@pytest.mark.parametrize("processes", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_prompts_in_chunks_beside_continuations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    """In this process, and in one of the engine's own, which imports the forcing by name."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
    model = checkpoint("Llama", tmp_path)
    options = {**SMALL, "max_num_batched_tokens": 8, "async_scheduling": True}
    with numba_hidden():
        scorer = VllmScorer(tmp_path, "float32", max_num_seqs=3, max_model_len=48, options=options)
    try:
        for sequence, scores in zip(SEQUENCES, scorer.score(SEQUENCES), strict=True):
            assert (scores.logprobs - expected(model, sequence)).abs().max() <= TOLERANCE
    finally:
        scorer.close()
    scorer.close()  # changes nothing


def test_whole_vocabulary_is_that_of_a_full_forward(engine: Any) -> None:
    scorer, model = engine
    for sequence, scores in zip(SEQUENCES, scorer.score(SEQUENCES), strict=True):
        reference = expected(model, sequence)
        assert scores.ids is None and scores.logprobs.dtype == torch.float32 and scores.target.dtype == torch.float64
        assert scores.logprobs.shape == (sequence.num_predictions, VOCAB)
        assert (scores.logprobs - reference).abs().max() <= TOLERANCE
        assert torch.equal(scores.target, of_tokens(scores.logprobs, sequence).double())
        # The tokens were forced, and the results are from before that: they are hardly ever the likeliest.
        assert (scores.target < scores.logprobs.max(1).values).float().mean() > 0.9


def test_likeliest_tokens_are_the_same_values(engine: Any) -> None:
    scorer, model = engine
    for sequence, scores in zip(SEQUENCES, scorer.score(SEQUENCES, top=5), strict=True):
        reference = expected(model, sequence)
        assert scores.ids is not None and scores.ids.shape == scores.logprobs.shape == (sequence.num_predictions, 5)
        assert (scores.logprobs - reference.gather(1, scores.ids)).abs().max() <= TOLERANCE
        assert (scores.logprobs - reference.topk(5).values).abs().max() <= TOLERANCE
        assert (scores.logprobs.diff(dim=1) <= 0).all()
        assert (scores.target - of_tokens(reference, sequence)).abs().max() <= TOLERANCE


def test_generates_the_greedy_tokens(engine: Any) -> None:
    scorer, model = engine
    prompts = [sequence.prompt for sequence in SEQUENCES]
    for prompt, whole, likeliest in zip(
        prompts, scorer.generate(prompts, 8), scorer.generate(prompts, 8, top=3), strict=True
    ):
        assert list(whole.token_ids) == list(likeliest.token_ids) == greedy(lambda ids: model(ids).logits, prompt, 8)
        reference = expected(model, TokenSequence(prompt, whole.token_ids))[-8:]
        assert (whole.scores.logprobs - reference).abs().max() <= TOLERANCE
        assert torch.equal(likeliest.scores.logprobs, whole.scores.logprobs.topk(3).values)
        assert torch.equal(likeliest.scores.target, likeliest.scores.logprobs[:, 0].double())


def test_the_continuation_is_decoded_token_by_token(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, _ = engine
    scheduler = scorer.llm.llm_engine.engine_core.engine_core.scheduler
    schedule, steps = scheduler.schedule, []

    def watched(*args: Any, **options: Any) -> Any:
        output = schedule(*args, **options)
        steps.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(scheduler, "schedule", watched)
    scorer.score(SEQUENCES[1:2])
    assert [tokens for tokens in steps if tokens] == [21, 1, 1, 1]


def test_an_empty_list_of_sequences_is_scored(engine: Any) -> None:
    assert engine[0].score([]) == engine[0].generate([], 4) == []


def test_a_prompt_or_token_that_does_not_fit(engine: Any) -> None:
    scorer, _ = engine
    assert scorer.score([sequence(40, MAX_LEN - 40, 3)], top=1)[0].target.shape == (MAX_LEN - 1,)
    with pytest.raises(ParameterError, match="65 tokens is longer than max_model_len, 64"):
        scorer.score([sequence(40, MAX_LEN - 39, 3)])
    with pytest.raises(ParameterError, match=r"0\.\.249, got 3\.\.250"):
        scorer.score([TokenSequence((3, 4), (VOCAB,))])
    with pytest.raises(ParameterError, match=r"0\.\.249, got -1\.\.3"):
        scorer.generate([(3, -1)], 2)


def test_a_token_that_was_not_forced_is_noticed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Forcing, "apply", lambda self, logits: logits)
    with pytest.raises(RuntimeError, match="were forced"):
        engine[0].score(SEQUENCES[1:2], top=1)


@pytest.mark.parametrize("name", ["Llama", "LlamaCanon"])
def test_overrides_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    """vLLM's own rules keep a file's rope_theta, and build the config before its keys can be overridden."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if name == "Llama":
        checkpoint(name, tmp_path)
    else:
        canon_checkpoint(tmp_path, hidden_size=64, head_dim=32)
    change_config(tmp_path, made_up=1)
    inputs = {"prompts": "random", "count": 2, "prompt_len": 20, "decode_len": 4, "dtype": "float32"}
    overrides = {"made_up": None, "rope_theta": 30.0}
    _, expected = score(tmp_path, engine="reference", hf_overrides=overrides, **inputs)
    _, plain = score(tmp_path, engine="reference", hf_overrides={"made_up": None}, **inputs)
    assert (plain[0].logprobs - expected[0].logprobs).abs().max() > 10 * TOLERANCE
    with numba_hidden():
        _, found = score(tmp_path, engine="vllm", hf_overrides=overrides, engine_options=SMALL, **inputs)
    for scores, other in zip(found, expected, strict=True):
        assert (scores.logprobs - other.logprobs).abs().max() < TOLERANCE
