"""Numbers out of bounds and values of wrong types raise an error with their name, before a request is queued."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers import canon_checkpoint
from lamella import LLM, SamplingParams
from lamella.cli.main import main
from lamella.engine.options import EngineOptions
from lamella.engine.requests.sampling_params import MAX_COMPLETIONS, MAX_STOP_LENGTH, MAX_STOPS
from lamella.errors import ConfigError, LamellaError, ParameterError
from lamella.validation import checked_int, finite, is_text, shown, whole

HUGE = 10**5000  # more digits than Python converts to a string
ODD = [
    True, 2**31, 2**63, 2**64, -(2**63) - 1, HUGE, 1e39, math.nan, math.inf, "1", "\ud800", b"x", [], [None], [2**70],
    ["\ud800"], {1: HUGE}, {HUGE: 1}, object(), 1j, np.bool_(True), np.array([1, 2]), torch.tensor(True),
]  # fmt: skip


class Rude:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(canon_checkpoint(tmp_path_factory.mktemp("canon")), device="cpu", max_num_seqs=4, num_blocks=64)


def attempt(call, refusal):
    """Return the result of a call, or the error that it raises."""
    try:
        return call(), None
    except refusal as error:
        return None, error


def is_one_line(error):
    return "\n" not in str(error) and len(str(error)) < 300


def complete(llm, **fields):
    params = SamplingParams(**{"max_tokens": 2, "ignore_eos": True, **fields})
    return llm.generate([{"prompt_token_ids": [5, 6]}], params, use_tqdm=False)[0].outputs


@pytest.mark.parametrize("value", [*ODD, Rude()], ids=range(len(ODD) + 1))
def test_bad_field_values_raise_before_a_step(llm, value):
    """For every value of a field, the call raises one line, or the request runs to its end."""
    for field in SamplingParams.__dataclass_fields__:
        fields = {"temperature": 0.7, field: value}
        outputs, error = attempt(lambda fields=fields: complete(llm, **fields), ParameterError)
        assert is_one_line(error) if error else all(output.finish_reason in ("length", "stop") for output in outputs)
    assert not llm.engine.has_work and not llm.engine.state.allocations


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", MAX_COMPLETIONS + 1),
        ("top_k", 2**63),
        ("max_tokens", 2**64),
        ("min_tokens", 2**63),
        ("seed", 2**63),
        ("temperature", 1e31),
        ("temperature", HUGE),
        ("repetition_penalty", 1e-30),
        ("repetition_penalty", 1e30),
        ("stop", ["x"] * (MAX_STOPS + 1)),
        ("stop", "x" * (MAX_STOP_LENGTH + 1)),
        ("stop", "\ud800"),
        ("stop_token_ids", [2**70]),
        ("logit_bias", {2**70: 1}),
    ],
    ids=range(14),
)
def test_numbers_out_of_bounds_raise(field, value):
    with pytest.raises(ParameterError, match=f"^{field} must be "):
        SamplingParams(**{"max_tokens": None, field: value})


def test_a_top_k_above_the_vocabulary_keeps_all(llm):
    fields = dict(seed=3, temperature=1.5, max_tokens=12)
    (every,) = complete(llm, **fields)
    for top_k in (-1, 128, 129, 2**31 - 1, 2**31, 2**63 - 1):
        assert complete(llm, top_k=top_k, **fields)[0].token_ids == every.token_ids


def test_numpy_and_torch_numbers_are_accepted(llm):
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(7),
        max_tokens=torch.tensor(3),
        seed=np.uint8(4),
        min_p=np.float64(0),
    )
    assert [type(value) for value in (params.temperature, params.top_k, params.max_tokens)] == [float, int, int]
    for ids in (np.array([5, 6]), torch.tensor([5, 6]), (5, np.int32(6)), range(5, 7)):
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        assert output.prompt_token_ids == [5, 6] and type(output.prompt_token_ids[0]) is int


def test_later_changes_of_lists_have_no_effect(llm):
    stop_ids, bias = [3], {5: 1.0}
    params = SamplingParams(stop_token_ids=stop_ids, logit_bias=bias, max_tokens=4, temperature=0)
    stop_ids.append(2**70)
    bias[2**70] = math.nan
    job = llm.engine.make_job("one", {"prompt_token_ids": [5]}, params)
    params.stop_token_ids.append("junk")
    params.logit_bias[1] = "junk"
    assert job.completions[0].request.params.stop_token_ids == [3]
    assert job.completions[0].request.params.logit_bias == {5: 1.0}
    with pytest.raises(ParameterError, match="stop_token_ids"):
        llm.engine.make_job("two", {"prompt_token_ids": [5]}, params)


@pytest.mark.parametrize(
    "prompt",
    [
        None, b"x", [], {}, {"prompt": "\ud800"}, {"prompt_token_ids": 5}, {"prompt_token_ids": "12"},
        {"prompt_token_ids": []}, {"prompt_token_ids": [HUGE]}, {"prompt_token_ids": [2**63]},
        {"prompt_token_ids": [1, True]}, {"prompt_token_ids": [1, 2.0]}, {"prompt_token_ids": torch.ones(2, 2)},
        {"prompt_token_ids": {1: 2}}, {"prompt_token_ids": [Rude()]}, {b"x": 1, 5: 2},
        {"prompt_token_ids": [1], "prompt": 5}, {"prompt_token_ids": [1], "cache_salt": "\ud800"},
        {"prompt_token_ids": [1], "multi_modal_data": {1: 2, "x": 3}}, {"prompt_token_ids": [1] * 1000},
    ],
    ids=range(20),
)  # fmt: skip
def test_bad_prompts_raise_one_line(llm, prompt):
    with pytest.raises(ParameterError) as caught:
        llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("wrong", [{"max_tokens": 3}, [None], [5], 7])
def test_sampling_params_of_wrong_type_raise(llm, wrong):
    with pytest.raises(ParameterError, match="sampling_params"):
        llm.generate([{"prompt_token_ids": [1]}], wrong, use_tqdm=False)


@pytest.mark.parametrize("value", [*ODD, Rude(), 0, -1], ids=range(len(ODD) + 3))
@pytest.mark.parametrize(
    "field",
    "max_model_len max_num_seqs max_num_batched_tokens tensor_parallel_size block_size num_blocks snapshot_bytes "
    "snapshot_interval seed hf_overrides limit_mm_per_prompt snapshot_prompts".split(),
)
def test_bad_engine_options_raise_one_line(field, value):
    options, error = attempt(lambda: EngineOptions(model="x", **{field: value}), ConfigError)
    if error:
        assert str(error).startswith(f"{field}=") and is_one_line(error)
    else:
        assert whole(value) is not None and -(2**63) <= getattr(options, field) < 2**63


@pytest.mark.parametrize("options", [dict(snapshot_bytes=2**47), dict(num_blocks=2**39, max_num_seqs=2**16)])
def test_state_larger_than_memory_raises(tmp_path, options):
    folder = canon_checkpoint(tmp_path, max_position_embeddings=2**20, num_hidden_layers=16, num_key_value_heads=4)
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}"):
        LLM(folder, device="cpu", **options)


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        (["bench", "latency", "demo"], "--requests", str(2**64)),
        (["bench", "latency", "demo"], "--input-len", "0"),
        (["bench", "offline", "demo"], "--repeats", "10001"),
        (["parity", "demo"], "--count", str(10**9)),
        (["parity", "demo"], "--seed", str(2**64)),
        (["parity", "demo"], "--top", str(2**64)),
        (["inspect", "demo"], "--context", str(2**64)),
        (["demo"], "--questions", str(2**64)),
        (["placement", "sweep", "demo"], "--requests", "0"),
    ],
)
def test_numbers_on_the_command_line_have_bounds(capsys, command, name, value):
    assert main([*command, name, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lamella: {name} {value}: must be at ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "option", [("--max-tokens", str(2**64)), ("--top-k", str(2**64)), ("--num-blocks", str(2**64))]
)
def test_numbers_of_generate_have_bounds(capsys, option):
    assert main(["generate", "demo", "-p", "x", *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lamella: {option[0][2:].replace('-', '_')}") and error.count("\n") == 1


def test_whole_and_finite_accept_only_numbers():
    assert [whole(value) for value in (5, np.int8(-3), torch.tensor(7))] == [5, -3, 7]
    assert all(whole(value) is None for value in (True, 1.0, "1", None, np.bool_(1), torch.tensor(True), np.float32(2)))
    assert [finite(value) for value in (2, 0.5, np.float32(0.5), torch.tensor(0.25))] == [2.0, 0.5, 0.5, 0.25]
    assert all(finite(value) is None for value in (True, "1", math.nan, -math.inf, HUGE, 1j, None, np.ones(2)))
    assert is_text("a") and not is_text("\udfff") and not is_text(b"a")
    assert shown(Rude()) == "a value of type Rude" and shown(HUGE) == "a value of type int"
    assert shown("x\ny\ud800") == "'x\\ny\\ud800'" and len(shown("x" * 1000)) == 80
    with pytest.raises(LamellaError, match=r"^x=7: must be at most 6$"):
        checked_int("x", 7, 1, 6)
