import math

import pytest

from lamella.engine.requests.resolve_params import resolve_params
from lamella.engine.requests.sampling_params import MAX_LOGPROBS, SamplingParams
from lamella.errors import LamellaError, ParameterError

pytestmark = pytest.mark.unit


def test_defaults():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert params.max_tokens == 16 and not params.greedy and params.stop_strings == ()
    params.validate_for(1)


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=0),
        dict(temperature=1e-9),
        dict(top_k=-1, top_p=1, min_p=1),
        dict(max_tokens=None, min_tokens=10**6),
        dict(stop="x"),
        dict(stop=["x", "yz"]),
        dict(stop=[], detokenize=False),
        dict(seed=-(2**63)),
        dict(logit_bias={3: -100, 4: 100.0}, stop_token_ids=[0]),
        dict(logprobs=0, prompt_logprobs=5),
    ],
)
def test_valid(fields):
    SamplingParams(**fields).validate_for(10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n", v) for v in (0, -1, 1.0, True, None, "1")),
        *(("temperature", v) for v in ("hot", math.nan, math.inf, -0.1, None, True)),
        *(("top_p", v) for v in (0, 1.01, math.nan, "1")),
        *(("top_k", v) for v in (-2, 1.5, False, math.nan)),
        *(("min_p", v) for v in (-0.1, 1.1, math.nan)),
        *(("seed", v) for v in (1.0, 2**63, "0", True)),
        *(("stop", v) for v in ("", [""], ["a", 1], 7, b"x")),
        *(("stop_token_ids", v) for v in (5, [-1], [1.0], [True], "12")),
        *(("max_tokens", v) for v in (0, 1.0, True)),
        *(("min_tokens", v) for v in (-1, None, 17)),
        *(("logprobs", v) for v in (-2, 1.0, True)),
        *(("prompt_logprobs", v) for v in (-2, "1")),
        *(("repetition_penalty", v) for v in (0, -1, math.nan, math.inf)),
        *(("presence_penalty", v) for v in (-2.1, 2.1, math.nan)),
        *(("frequency_penalty", v) for v in (-2.1, 2.1, "0")),
        *(("logit_bias", v) for v in ({"1": 1.0}, {1: math.nan}, {1: 101}, {-1: 0}, {True: 0}, [1])),
        *(("bad_words", v) for v in ("x", [""], [1])),
        *(("bad_words_token_ids", v) for v in ([[]], [1], [[-1]])),
        *(("allowed_token_ids", v) for v in ([], 5, [-1], ["1"])),
        *(("truncate_prompt_tokens", v) for v in (0, -2, 1.5, True)),
        *(("spaces_between_special_tokens", v) for v in (False, None)),
        *(("structured_outputs", v) for v in ({"json": {}},)),
        *(("logits_processors", v) for v in ([print],)),
        *(("output_kind", v) for v in (1, 2, "delta")),
        *((f, 7) for f in ("flat_logprobs", "logprob_token_ids", "skip_reading_prefix_cache")),
        *((f, 7) for f in ("thinking_token_budget", "repetition_detection")),
        *((f, v) for f in ("ignore_eos", "detokenize", "skip_special_tokens") for v in (0, None)),
    ],
)
def test_invalid_names_field_and_value(field, value):
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} must be ") and message.endswith(f"got {value!r}") and "\n" not in message
    assert isinstance(caught.value, LamellaError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (dict(n=2, temperature=0), "n"),
        (dict(min_tokens=4, max_tokens=3), "min_tokens"),
        (dict(stop="x", detokenize=False), "stop"),
    ],
)
def test_contradictions(fields, field):
    with pytest.raises(ParameterError, match=f"^{field} must be "):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    "fields", [dict(logit_bias={10: 1.0}), dict(stop_token_ids=[3, 10]), dict(logprobs=11), dict(prompt_logprobs=11)]
)
def test_validate_for(fields):
    params = SamplingParams(**fields)
    params.validate_for(11)
    with pytest.raises(ParameterError):
        params.validate_for(10)


def test_most_logprobs():
    resolve_params(SamplingParams(logprobs=MAX_LOGPROBS), None, 10**5, None)
    with pytest.raises(ParameterError, match=str(MAX_LOGPROBS)):
        resolve_params(SamplingParams(logprobs=MAX_LOGPROBS + 1), None, 10**5, None)


@pytest.mark.parametrize("edge", [-2, 2, -2.0, 2.0])
def test_penalties_may_be_at_their_bounds(edge):
    params = SamplingParams(presence_penalty=edge, frequency_penalty=edge)
    assert (params.presence_penalty, params.frequency_penalty) == (edge, edge)
