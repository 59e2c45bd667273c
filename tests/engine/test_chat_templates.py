"""Chats rendered by the templates of public models, compared with transformers' `apply_chat_template`."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import tokenizers
from tokenizers import models

from lamella.checkpoint.tokenizer_files import LoadedTokenizer
from lamella.engine.requests.chat import content_format
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import ParameterError

TEMPLATES = {
    path.stem: path.read_text() for path in sorted((Path(__file__).parents[1] / "chat_templates").glob("*.jinja"))
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather of a city, "now" & <soon>',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "name, e.g. Zürich"},
                "days": {"type": "integer", "enum": [1, 7]},
            },
            "required": ["city"],
        },
    },
}
USER = {"role": "user", "content": "  What is the weather?  "}
SYSTEM = {"role": "system", "content": "Answer in one word."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
    ],
}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": '{"degrees": 7}'}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "the weather?"}]}
THOUGHT = {"role": "assistant", "content": "Rain.", "reasoning_content": "It is November."}
CHATS = {
    "one question": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "several turns": ([SYSTEM, USER, {"role": "assistant", "content": "Rain."}, USER], {}),
    "no generation prompt": ([USER, {"role": "assistant", "content": "Rain. "}], {"add_generation_prompt": False}),
    "parts": ([SYSTEM, PARTS], {}),
    "tools": ([SYSTEM, USER], {"tools": [WEATHER, WEATHER]}),
    "tools without system": ([USER], {"tools": [WEATHER]}),
    "tool calls": ([USER, CALL, RESULT], {"tools": [WEATHER]}),
    "tool calls of the past": ([SYSTEM, USER, CALL, RESULT, {"role": "assistant", "content": "7"}, USER], {}),
    "thinking": ([USER, THOUGHT, USER], {"enable_thinking": True}),
    "no thinking": ([SYSTEM, USER], {"enable_thinking": False}),
    "thoughts in the text": ([USER, {"role": "assistant", "content": "<think>\nHm\n</think>\n\nRain."}, USER], {}),
    "None": ([USER, {**CALL, "content": None}, RESULT], {"tools": [WEATHER]}),
    "user only twice": ([USER, USER], {}),
    "continued": (
        [USER, {"role": "assistant", "content": "It  rains "}],
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
    "custom names": ([USER], {"date_string": "1 Jan 2020", "custom_tools": [WEATHER], "bos_token": "<other>"}),
}


@pytest.fixture(scope="module")
def library():
    return tokenizers.Tokenizer(
        models.WordLevel({text: i for i, text in enumerate(SPECIAL.values())}, unk_token="<unk>")
    )


@pytest.fixture(scope="module")
def reference(library):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=library, **SPECIAL)


@pytest.fixture(scope="module")
def ours(library):
    return Tokenizer(LoadedTokenizer(library, SPECIAL))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_text_equals_transformers(name, chat, ours, reference):
    messages, arguments = CHATS[chat]
    arguments = {"add_generation_prompt": True, "tokenize": False, "chat_template": TEMPLATES[name], **arguments}
    try:
        expected = reference.apply_chat_template(messages, **arguments)
    except Exception:  # the template refuses the chat, or fails on it
        with pytest.raises(ParameterError, match=r"^(chat_template|continue_final_message)"):
            ours.apply_chat_template(messages, **arguments)
        return
    assert ours.apply_chat_template(messages, **arguments) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_accept_most_chats(name, ours):
    taken = 0
    for messages, arguments in CHATS.values():
        try:
            ours.apply_chat_template(messages, tokenize=False, chat_template=TEMPLATES[name], **arguments)
        except ParameterError:
            continue
        taken += 1
    assert taken >= 8


def test_content_format_is_detected():
    found = {name: content_format(text) for name, text in TEMPLATES.items()}
    assert found["gemma-3"] == found["tool_chat_template_llama4_json"] == "openai"
    assert found["SmolLM2"] == found["Qwen-Qwen3-0.6B"] == "string"


def test_strftime_now_uses_the_current_date(ours, reference):
    import datetime

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    text = "{{ strftime_now('%d %b %Y') }}"
    with mock.patch("lamella.engine.requests.chat.datetime", Day):
        assert ours.apply_chat_template([USER], tokenize=False, chat_template=text) == "03 Feb 2031"
