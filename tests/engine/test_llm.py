"""LLM: outputs, stop conditions, streams, and one-line errors."""

from __future__ import annotations

import json
from itertools import pairwise, zip_longest

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers import VOCAB, canon_checkpoint, random_prompts
from lamella import LLM, SamplingParams
from lamella.errors import ConfigError, ParameterError

PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = canon_checkpoint(tmp_path_factory.mktemp("canon"), eos_token_id=[3, 4])
    vocabulary = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, device="cpu", max_num_seqs=4, max_num_batched_tokens=32, num_blocks=64)


def greedy(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **changes})


def test_output_has_all_documented_fields(llm):
    params = greedy(logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate("w5 w6 w7 w8", params, use_tqdm=False)
    assert output.prompt == "w5 w6 w7 w8"
    assert output.prompt_token_ids == PROMPT["prompt_token_ids"]
    assert output.finished
    assert output.prompt_logprobs[0] is None
    for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert token in entry
        assert 2 <= len(entry) <= 3
    (completion,) = output.outputs
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == len(completion.logprobs) == 8
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry[token].rank == 1
        assert entry[token].decoded_token.strip() == f"w{token}"
        assert max(e.logprob for e in entry.values()) == entry[token].logprob
    assert completion.text.split() == [f"w{token}" for token in completion.token_ids]
    assert completion.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True))
    )


def test_logprobs_equal_a_plain_forward(llm):
    (output,) = llm.generate(PROMPT, greedy(logprobs=0, prompt_logprobs=0), use_tqdm=False)
    tokens = output.prompt_token_ids + output.outputs[0].token_ids
    with torch.no_grad():
        model = llm.engine.model
        expected = model.compute_logits(model(torch.tensor(tokens))).log_softmax(-1)
    entries = output.prompt_logprobs[1:] + output.outputs[0].logprobs
    for position, (token, entry) in enumerate(zip(tokens[1:], entries, strict=True)):
        assert entry[token].logprob == pytest.approx(expected[position, token].item(), abs=1e-4)


def test_outputs_keep_prompt_order_and_parameters(llm):
    prompts = random_prompts([30, 2, 11, 1, 25, 3])
    params = [greedy(max_tokens=n) for n in (1, 9, 2, 5, 3, 12)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == [p["prompt_token_ids"] for p in prompts]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]


def test_n_completions_differ_and_are_reproducible(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=10, ignore_eos=True, prompt_logprobs=0)
    first, second = (llm.generate(PROMPT, params, use_tqdm=False)[0] for _ in range(2))
    texts = [completion.token_ids for completion in first.outputs]
    assert [completion.index for completion in first.outputs] == [0, 1, 2]
    assert len({tuple(text) for text in texts}) == 3
    assert [completion.token_ids for completion in second.outputs] == texts
    assert len(first.prompt_logprobs) == 4


def test_a_stop_token_and_an_eos_end_the_text(llm):
    tokens = llm.generate(PROMPT, greedy(), use_tqdm=False)[0].outputs[0].token_ids
    stop = tokens[3]
    params = greedy(stop_token_ids=[stop])
    completion = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
    assert completion.finish_reason == "stop"
    assert completion.stop_reason == stop
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    biased = greedy(logit_bias={4: 100}, ignore_eos=False)
    completion = llm.generate(PROMPT, biased, use_tqdm=False)[0].outputs[0]
    assert (completion.finish_reason, completion.stop_reason, completion.token_ids) == ("stop", None, [4])


def test_a_stop_string_ends_the_text_before_itself(llm):
    completion = llm.generate(PROMPT, greedy(), use_tqdm=False)[0].outputs[0]
    words = completion.text.split()
    stop = f"{words[2]} {words[3]}"
    stopped = llm.generate(PROMPT, greedy(stop=[stop]), use_tqdm=False)[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stopped.text == completion.text[: completion.text.index(stop)]


def test_max_tokens_ends_at_the_models_length(folder):
    llm = LLM(folder, device="cpu", max_model_len=20)
    (output,) = llm.generate(PROMPT, greedy(max_tokens=None), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16
    assert output.outputs[0].finish_reason == "length"


def test_stream_grows_to_the_same_result(llm):
    (whole,) = llm.generate(PROMPT, greedy(), use_tqdm=False)
    texts = []
    for output in llm.stream(PROMPT, greedy()):
        texts.append(output.outputs[0].text)
    assert texts[-1] == whole.outputs[0].text
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(texts) == 8


def test_two_interleaved_streams(llm):
    prompts = random_prompts([5, 9])
    alone = [llm.generate(prompt, greedy(), use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    first, second = (
        list(pair) for pair in zip(*(zip_longest(*(llm.stream(p, greedy()) for p in prompts))), strict=True)
    )
    for outputs, tokens in zip((first, second), alone, strict=True):
        assert [output for output in outputs if output][-1].outputs[0].token_ids == tokens
    # One gets its tokens earlier than the other, whose caller then gets several tokens at a time, but always the end.
    slow = llm.stream(prompts[0], greedy(max_tokens=20))
    next(slow)
    list(llm.stream(prompts[1], greedy(max_tokens=30)))
    assert len(list(slow)[-1].outputs[0].token_ids) == 20


def test_leaving_a_stream_early_cancels_the_request(llm):
    stream = llm.stream(PROMPT, greedy(max_tokens=50))
    next(stream)
    assert llm.stats()["running"] == 1
    stream.close()
    stats = llm.stats()
    assert stats["running"] == stats["waiting"] == stats["blocks_used"] == stats["slots_used"] == 0


def test_an_error_in_a_step_leaves_the_engine_usable(llm, monkeypatch):
    expected = llm.generate(PROMPT, greedy(), use_tqdm=False)[0].outputs[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "launch", lambda step: (_ for _ in ()).throw(RuntimeError("device lost")))
        with pytest.raises(RuntimeError, match="device lost"):
            llm.generate([PROMPT] * 3, greedy(), use_tqdm=False)
    assert llm.stats()["blocks_used"] == 0
    assert llm.generate(PROMPT, greedy(), use_tqdm=False)[0].outputs[0].token_ids == expected


def test_progress_is_shown(llm, capsys):
    llm.generate([PROMPT] * 2, greedy())
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tok/s" in shown


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ({"prompt_token_ids": []}, greedy(), "prompt_token_ids"),
        ({"prompt_token_ids": [VOCAB]}, greedy(), "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, greedy(), "prompt_token_ids"),
        ({"prompt_token_ids": [1.5]}, greedy(), "prompt_token_ids"),
        ({"prompt_token_ids": [1], "lora": 1}, greedy(), "lora"),
        ({"prompt": 3}, greedy(), "prompt"),
        (7, greedy(), "prompt"),
        ({"prompt_token_ids": [1] * 512}, greedy(), "max_model_len=512"),
        ({"prompt_token_ids": [1] * 500}, greedy(max_tokens=None), None),
        (PROMPT, greedy(stop_token_ids=[VOCAB]), "stop_token_ids"),
        (PROMPT, greedy(logprobs=VOCAB + 1), "logprobs"),
        (PROMPT, greedy(logit_bias={VOCAB: 1.0}), "logit_bias"),
    ],
)
def test_bad_request_raises_one_line_and_nothing_runs(llm, prompt, params, named):
    before = llm.stats()
    if named is None:
        assert llm.generate([prompt], params, use_tqdm=False)[0].finished
        return
    with pytest.raises(ParameterError) as caught:
        llm.generate([PROMPT, prompt], params, use_tqdm=False)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert llm.stats() == before


def test_request_larger_than_the_pools_raises(folder):
    llm = LLM(folder, device="cpu", num_blocks=4)
    with pytest.raises(ParameterError, match=r"5 blocks of 16 tokens, more than num_blocks=4"):
        llm.generate({"prompt_token_ids": [1] * 60}, greedy(max_tokens=6), use_tqdm=False)
    assert llm.generate({"prompt_token_ids": [1] * 60}, greedy(max_tokens=5), use_tqdm=False)[0].finished


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"device": "abacus"}, "device"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": 513}, "max_model_len"),
        ({"max_num_seqs": 2.5}, "max_num_seqs"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens"),
        ({"block_size": -1}, "block_size"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"seed": "x"}, "seed"),
        ({"load_format": "gguf"}, "load_format"),
        ({"enforce_eager": 1}, "enforce_eager"),
        ({"round_norms_twice": 1}, "round_norms_twice"),
        ({"round_norms_twice": True}, "round_norms_twice=True: without effect on a float32 model; leave it out"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"placement": ["attention"]}, "placement"),
        ({"deterministic": True}, "deterministic"),
    ],
)
def test_bad_option_raises_one_line(folder, options, named):
    with pytest.raises(ConfigError) as caught:
        LLM(folder, **{"device": "cpu", **options})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_option_raises(folder):
    with pytest.raises(TypeError, match="gpu_memory"):
        LLM(folder, gpu_memory=1)


def test_text_needs_a_tokenizer(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    llm = LLM(tmp_path, device="cpu")
    with pytest.raises(ParameterError, match=r"tokenizer\.json"):
        llm.generate("text", greedy(), use_tqdm=False)
    with pytest.raises(ParameterError, match=r"stop=.*tokenizer\.json"):
        llm.generate(PROMPT, greedy(stop="x"), use_tqdm=False)
    assert llm.generate(PROMPT, greedy(), use_tqdm=False)[0].outputs[0].text == ""


def test_generation_config_adds_ends_of_text(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 9]}))
    assert LLM(tmp_path, device="cpu").engine.admission.eos_token_ids == (3, 4, 9)


def test_dummy_weights_need_only_a_config(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    first, second, other = (
        LLM(tmp_path, device="cpu", load_format="dummy", dtype="bfloat16", seed=seed) for seed in (1, 1, 2)
    )
    weights = [dict(llm.engine.model.named_parameters()) for llm in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])
    assert weights[0]["lm_head.weight"].dtype == torch.bfloat16


def test_first_token_after_min_tokens_can_end_the_text(folder):
    llm = LLM(folder, device="cpu")
    prompt = {"prompt_token_ids": [5, 6, 7]}

    def answer(**params):
        given = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, **params)
        return llm.generate(prompt, given, use_tqdm=False)[0].outputs[0]

    tokens = answer().token_ids
    last = next(index for index in range(1, 8) if tokens[index] not in tokens[:index])
    ended = answer(min_tokens=last, stop_token_ids=[tokens[last]])
    assert ended.token_ids == tokens[: last + 1] and ended.finish_reason == "stop"
    # One token more, and the stop token is kept out where it would have come.
    later = answer(min_tokens=last + 1, stop_token_ids=[tokens[last]])
    assert later.token_ids[:last] == tokens[:last] and later.token_ids[last] != tokens[last]
