"""vLLM's arguments: accepted without effect, supported, or rejected with an error that names them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import numpy
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import LlamaConfig

from helpers import hf_checkpoint
from lamella import LLM, AsyncLLM, SamplingParams
from lamella.engine.options import EngineOptions
from lamella.engine.steps import sampler
from lamella.engine.steps.sampler import SamplingRow
from lamella.errors import ConfigError, ParameterError
from lamella.models import LlamaForCausalLM
from lamella.serve.vllm_arguments import ARGUMENTS, engine_options

SIZE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
STOP, WORD = 257, "ab"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a byte-level model with a stop token 257 (`<|x|>`), and a merged token 258 (`ab`)."""
    folder = tmp_path_factory.mktemp("model")
    hf_checkpoint(folder, LlamaConfig(**SIZE, eos_token_id=256, max_position_embeddings=512))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<eos>": 256, "<|x|>": 257, "ab": 258}
    library = Library(models.BPE(vocabulary, [("a", "b")]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_tokens([AddedToken("<|x|>", normalized=False)])
    library.add_special_tokens(["<eos>"])
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder, num_blocks=64)


def generate(llm: LLM, prompt="hi", **params):
    params = {"temperature": 0, "max_tokens": 6, "ignore_eos": True} | params
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0]


class TestEngineArguments:
    def test_arguments_without_effect_are_accepted_and_logged_once(self, folder, caplog):
        given = dict(trust_remote_code=True, swap_space=4, disable_log_stats=True, pipeline_parallel_size=1)
        with caplog.at_level(logging.INFO, "lamella"):
            LLM(folder, num_blocks=8, **given)
        (said,) = [r.message for r in caplog.records if "arguments of vLLM" in r.message]
        assert said == "arguments of vLLM without effect here: " + ", ".join(f"{k}={v!r}" for k, v in given.items())

    @pytest.mark.parametrize("value", [True, False])
    def test_remote_code_is_never_run(self, value):
        assert engine_options({"trust_remote_code": value}) == {}

    @pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.otherwise])
    def test_unsupported_argument_error_names_an_alternative(self, name):
        with pytest.raises(ConfigError) as caught:
            engine_options({name: "something else"})
        message = str(caught.value)
        assert message == f"{name}='something else': not supported: {ARGUMENTS[name].otherwise}"

    def test_numbers_are_not_accepted_as_booleans(self):
        for name, value in (("pipeline_parallel_size", True), ("enable_lora", 0), ("cpu_offload_gb", False)):
            with pytest.raises(ConfigError, match=name):
                engine_options({name: value})

    def test_num_gpu_blocks_override_sets_num_blocks(self, folder):
        assert LLM(folder, num_gpu_blocks_override=7).stats()["blocks"] == 7
        with pytest.raises(ConfigError, match="contradicts"):
            LLM(folder, num_blocks=6, num_gpu_blocks_override=7)
        for both in ({"num_blocks": None}, {"num_blocks": 7}):
            assert engine_options(both | {"num_gpu_blocks_override": 7}) == {"num_blocks": 7}

    def test_none_is_the_default(self):
        options = EngineOptions(model="m", max_num_seqs=None, enable_prefix_caching=None, block_size=None, seed=5)
        assert options == EngineOptions(model="m", seed=5)
        assert isinstance(EngineOptions(model="m", seed=None).seed, int)

    def test_unknown_argument_raises_type_error(self, folder):
        with pytest.raises(TypeError, match="unexpected keyword argument 'made_up'"):
            LLM(folder, made_up=1)
        with pytest.raises(TypeError, match="unexpected keyword argument 'made_up'"):
            AsyncLLM(folder, made_up=1)

    def test_async_llm_uses_the_same_rules(self, folder):
        with pytest.raises(ConfigError, match="merge the adapter"):
            AsyncLLM(folder, enable_lora=True)

        async def run() -> None:
            async with AsyncLLM(folder, trust_remote_code=True, num_blocks=8) as engine:
                assert engine.get_tokenizer().decode([72]) == "i"
                plain = {"tokenization_kwargs": {"add_special_tokens": False}, "priority": 0, "lora_request": None}
                async for output in engine.generate("hi", SamplingParams(max_tokens=1), **plain):
                    assert output.prompt_token_ids == engine.get_tokenizer().encode("hi", add_special_tokens=False)
                with pytest.raises(ParameterError, match="priority=3"):
                    async for _ in engine.generate("hi", priority=3):
                        pass

        asyncio.run(run())

    @pytest.mark.parametrize("value", [0, 1.5, -0.1, "0.9", True])
    def test_bad_memory_fractions_raise(self, folder, value):
        with pytest.raises(ConfigError, match="gpu_memory_utilization="):
            LLM(folder, gpu_memory_utilization=value)

    def test_memory_fraction_already_in_use_raises(self, folder, monkeypatch):
        from lamella.engine import memory

        monkeypatch.setattr(memory, "_total_memory", lambda device: 100 << 20)
        monkeypatch.setattr(memory, "_free_memory", lambda device: 50 << 20)
        with pytest.raises(ConfigError, match=r"0\.50 of the memory of cpu is in use already; give a larger"):
            LLM(folder, gpu_memory_utilization=0.4)
        one = LLM(folder, gpu_memory_utilization=0.52, max_num_seqs=256).stats()["state_bytes"]
        two = LLM(folder, gpu_memory_utilization=0.54, max_num_seqs=256).stats()["state_bytes"]
        assert 1 << 20 < one < 3 << 20 < two < 5 << 20

    def test_seed_none_differs_at_each_start(self, folder):
        params = SamplingParams(temperature=5.0, max_tokens=20, ignore_eos=True)

        def answer(seed: int | None) -> list[int]:
            outputs = LLM(folder, num_blocks=8, seed=seed).generate("hi", params, use_tqdm=False)
            return outputs[0].outputs[0].token_ids

        assert answer(3) == answer(3)
        assert answer(None) != answer(None)


class TestRequestArguments:
    def test_unsupported_sampling_fields_accept_only_defaults(self, llm):
        one = SamplingParams(max_tokens=1)
        for accepted in ({"lora_request": None}, {"priority": None}, {"priority": [0]}, {"tokenization_kwargs": {}}):
            llm.generate("hi", one, use_tqdm=False, **accepted)
        for refused in ({"lora_request": "adapter"}, {"priority": 1}, {"priority": [2]}):
            with pytest.raises(ParameterError, match=next(iter(refused))):
                llm.generate("hi", one, use_tqdm=False, **refused)

    @pytest.mark.parametrize(
        "ids", [[5, 6], (5, 6), numpy.array([5, 6]), torch.tensor([5, 6])], ids=lambda i: type(i).__name__
    )
    def test_token_ids_of_any_kind(self, llm, ids):
        params = SamplingParams(max_tokens=1)
        for prompt in (ids, [{"prompt_token_ids": ids}], [ids]):
            assert llm.generate(prompt, params, use_tqdm=False)[0].prompt_token_ids == [5, 6]

    @pytest.mark.parametrize("ids", [[5, 6.5], ["5"], [True], numpy.array([1.5]), torch.tensor([[1]]), 5, "56", [300]])
    def test_bad_token_id_error_names_it(self, llm, ids):
        with pytest.raises(ParameterError, match="prompt_token_ids"):
            llm.generate([{"prompt_token_ids": ids}], use_tqdm=False)

    @pytest.mark.parametrize("prompt", ["", {"prompt": "", "add_special_tokens": False}])
    def test_empty_prompt_error_names_the_way_out(self, llm, prompt):
        with pytest.raises(ParameterError, match=r"has no tokens: give at least one"):
            llm.generate([prompt], use_tqdm=False)

    def test_lone_surrogate_error_names_it(self, llm):
        with pytest.raises(ParameterError, match=r"U\+D83D\) at character 1"):
            llm.generate(["a\ud83d"], use_tqdm=False)

    def test_unlimited_max_tokens_is_limited_by_the_pools(self, folder):
        llm = LLM(folder, num_blocks=3, block_size=16, enable_prefix_caching=False)
        output = generate(llm, [1] * 10, max_tokens=None)
        assert len(output.outputs[0].token_ids) == 48 - 10 + 1 and output.outputs[0].finish_reason == "length"
        with pytest.raises(ParameterError, match="num_blocks=3"):
            generate(llm, [1] * 10, max_tokens=100)


class TestTruncation:
    def test_truncation_keeps_the_last_tokens(self, llm):
        for limit, expected in ((2, [7, 8]), (4, [5, 6, 7, 8]), (9, [5, 6, 7, 8]), (-1, [5, 6, 7, 8])):
            assert generate(llm, [5, 6, 7, 8], truncate_prompt_tokens=limit).prompt_token_ids == expected

    def test_truncation_to_minus_one_leaves_space_for_the_output(self, folder):
        llm = LLM(folder, num_blocks=64, max_model_len=20)
        assert len(generate(llm, [5] * 50, truncate_prompt_tokens=-1, max_tokens=6).prompt_token_ids) == 14


class TestLogprobs:
    def test_minus_one_reports_all_logprobs(self, folder, llm):
        output = generate(llm, [5, 6], logprobs=-1, prompt_logprobs=-1, max_tokens=2)
        assert [len(entry) for entry in output.outputs[0].logprobs] == [300, 300]
        assert len(output.prompt_logprobs[1]) == 300

    def test_max_logprobs_limits_requests(self, folder):
        llm = LLM(folder, num_blocks=8, max_logprobs=5)
        assert len(generate(llm, logprobs=5).outputs[0].logprobs[0]) in (5, 6)
        for params in ({"logprobs": 6}, {"prompt_logprobs": 6}, {"logprobs": -1}):
            with pytest.raises(ParameterError, match=r"at most 5, got .*max_logprobs=-1"):
                generate(llm, **params)
        with pytest.raises(ConfigError, match="max_logprobs=-2"):
            LLM(folder, max_logprobs=-2)


class TestRestrictedTokens:
    def test_only_allowed_tokens_are_generated(self, llm):
        assert set(generate(llm, allowed_token_ids=[7, 9], temperature=2.0).outputs[0].token_ids) <= {7, 9}
        with pytest.raises(ParameterError, match="allowed_token_ids must be of token ids below"):
            generate(llm, allowed_token_ids=[300])

    def test_bias_does_not_allow_forbidden_tokens(self, llm):
        assert generate(llm, allowed_token_ids=[7], logit_bias={8: 100.0}).outputs[0].token_ids == [7] * 6

    def test_bad_words_of_one_token_are_never_generated(self, llm):
        favored = {258: 100.0, 71: 50.0}
        assert generate(llm, logit_bias=favored).outputs[0].token_ids == [258] * 6
        assert generate(llm, logit_bias=favored, bad_words=[WORD]).outputs[0].token_ids == [71] * 6

    def test_last_token_of_a_bad_word_is_forbidden(self, llm):
        first, second = llm.get_tokenizer().encode("xy")
        favored = {first: 100.0, second: 99.0}
        output = generate(llm, bad_words=["xx"], logit_bias=favored).outputs[0]
        assert output.token_ids == [first, second] * 3
        # The same as ids.
        again = generate(llm, bad_words_token_ids=[[first, first]], logit_bias=favored).outputs[0]
        assert again.token_ids == output.token_ids

    def test_bad_words_need_a_tokenizer_and_tokens(self, folder, llm):
        with pytest.raises(ParameterError, match="bad_words: the model has no tokenizer"):
            generate(LLM(folder, num_blocks=8, skip_tokenizer_init=True), [5], bad_words=["x"])
        with pytest.raises(ParameterError, match="bad_words_token_ids must be of token ids below"):
            generate(llm, bad_words_token_ids=[[300]])

    def test_gpu_path_processes_equal_logits(self):
        """On GPUs a separate kernel draws from the processed logits."""
        params = SamplingParams(allowed_token_ids=[1, 2], bad_words_token_ids=[[3, 2]], temperature=0)
        row = SamplingRow(params, 0, 1, [0], [3], ())
        seen = []
        logits = torch.tensor([[5.0, 1.0, 4.0, 3.0]])
        choice = sampler.choose(logits, [row], lambda edited: seen.append(edited) or edited.argmax(-1))
        assert choice.tokens.tolist() == [1]
        assert seen[0].isinf().tolist() == [[True, False, True, True]] and logits[0, 0] == 5


FORCED = dict(logit_bias={STOP: 100.0}, stop_token_ids=[STOP])


class TestStopTokensInTheText:
    @pytest.mark.parametrize("include", [False, True])
    def test_include_stop_str_adds_the_stop_token_text(self, llm, include):
        output = generate(llm, include_stop_str_in_output=include, **FORCED).outputs[0]
        assert (output.text, output.stop_reason, output.token_ids) == ("<|x|>" * include, STOP, [STOP])

    def test_special_tokens_are_skipped_by_default(self, llm):
        forced = dict(logit_bias={256: 100.0}, ignore_eos=False, include_stop_str_in_output=True)
        assert generate(llm, **forced).outputs[0].text == ""
        assert generate(llm, skip_special_tokens=False, **forced).outputs[0].text == "<eos>"


class TestConstructedModels:
    def test_a_module_is_a_model(self, folder):
        module = LlamaForCausalLM.from_pretrained(folder)
        expected = generate(LLM(folder, num_blocks=8), [5, 6, 7]).outputs[0].token_ids
        llm = LLM(model=module, num_blocks=8, tokenizer=str(folder))
        assert generate(llm, [5, 6, 7]).outputs[0].token_ids == expected
        assert llm.engine.model is module and llm.engine.admission.eos_token_ids == (256,)
        assert generate(llm, "hi").outputs[0].text

    def test_dtype_of_a_constructed_model(self, folder):
        for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
            module = LlamaForCausalLM.from_pretrained(folder)
            assert LLM(module, num_blocks=8, dtype=dtype).engine.model.lm_head.weight.dtype == expected

    def test_unsupported_options_of_constructed_models_raise(self, folder):
        module = LlamaForCausalLM.from_pretrained(folder)
        for options in ({"tensor_parallel_size": 2}, {"load_format": "dummy"}):
            with pytest.raises(ConfigError, match="a constructed model is used as it is"):
                LLM(module, **options)
        with pytest.raises(ConfigError, match="model=Linear: must be a folder"):
            LLM(torch.nn.Linear(2, 2))
