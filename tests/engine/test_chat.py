"""Chats: prompts, templates, images, errors, defaults of generation_config.json, and `lamella chat`."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from helpers import hf_checkpoint
from lamella import LLM, SamplingParams
from lamella.checkpoint.tokenizer_files import chat_templates_of
from lamella.engine.requests.chat import content_format, plain, read_messages, render_chat, select_template
from lamella.errors import CheckpointError, ConfigError, ParameterError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
USER = {"role": "user", "content": "hi"}


@pytest.fixture
def folder(tmp_path):
    from transformers import LlamaConfig

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    hf_checkpoint(tmp_path, LlamaConfig(**size, num_attention_heads=2))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    return tmp_path


def load(folder, **options):
    return LLM(folder, device="cpu", num_blocks=32, **options)


ONE = SamplingParams(max_tokens=1, temperature=0)


class TestPrompts:
    def test_bos_of_the_template_is_not_doubled(self, folder):
        output = load(folder).chat([USER], ONE, use_tqdm=False)[0]
        assert output.prompt == "<s>[user]hi[a]" and output.prompt_token_ids.count(256) == 1

    def test_special_tokens_are_added_on_request(self, folder):
        output = load(folder).chat(
            [USER], ONE, use_tqdm=False, chat_template="hi", tokenization_kwargs={"add_special_tokens": True}
        )
        assert output[0].prompt_token_ids[0] == 256

    def test_several_chats_answer_in_order(self, folder):
        chats = [[USER], [USER, {"role": "assistant", "content": "yes"}, USER]]
        outputs = load(folder).chat(chats, [ONE, ONE], use_tqdm=False)
        assert [output.prompt for output in outputs] == ["<s>[user]hi[a]", "<s>[user]hi[assistant]yes[user]hi[a]"]

    def test_a_final_message_is_continued(self, folder):
        chat = [USER, {"role": "assistant", "content": "I think "}]
        output = load(folder).chat(chat, ONE, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)[
            0
        ]
        assert output.prompt == "<s>[user]hi[assistant]I think "

    def test_template_given_by_the_caller_is_used(self, folder):
        llm = load(folder)
        names = {"chat_template": "{{ x }}{{ tools[0].name }}", "chat_template_kwargs": {"x": 5}}
        (prompt,) = llm.preprocess_chat([USER], tools=[{"name": "f"}], **names)
        assert prompt == {"prompt": "5f", "add_special_tokens": False}

    def test_parts_are_joined_for_string_templates(self, folder):
        parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
        (prompt,) = load(folder).preprocess_chat([{"role": "user", "content": parts}])
        assert prompt["prompt"] == "<s>[user]a\nb\nc[a]"

    def test_parts_are_kept_for_openai_templates(self, folder):
        template = (
            "{% for m in messages %}{% for p in m['content'] %}({{ p.type }} {{ p.text }}){% endfor %}{% endfor %}"
        )
        llm = load(folder)
        (prompt,) = llm.preprocess_chat([{"role": "user", "content": ["a", "b"]}], chat_template=template)
        assert prompt["prompt"] == "(text a)(text b)"
        (prompt,) = llm.preprocess_chat([USER], chat_template=template, chat_template_content_format="openai")
        assert prompt["prompt"] == "(text hi)"

    def test_stream_accepts_a_preprocessed_chat(self, folder):
        llm = load(folder)
        (prompt,) = llm.preprocess_chat([USER])
        assert list(llm.stream(prompt, ONE))[-1].prompt == "<s>[user]hi[a]"

    def test_json_tool_arguments_are_parsed_for_the_template(self):
        call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
        read, _ = read_messages([{"role": "assistant", "tool_calls": [call]}], "string", False, None)
        assert read[0]["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": 1}}}]
        with pytest.raises(ParameterError, match="arguments are not JSON"):
            read_messages([{"role": "a", "tool_calls": [{"function": {"arguments": "{"}}]}], "string", False, None)


class TestTemplates:
    def test_template_files_have_transformers_precedence(self, tmp_path):
        assert chat_templates_of(tmp_path) is None
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
        assert chat_templates_of(tmp_path) == "config"
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
        assert chat_templates_of(tmp_path) == "processor"
        (tmp_path / "chat_template.jinja").write_text("jinja")
        assert chat_templates_of(tmp_path) == "jinja"
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("more")
        assert chat_templates_of(tmp_path) == {"default": "jinja", "rag": "more"}

    def test_named_templates(self, tmp_path):
        named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        found = chat_templates_of(tmp_path)
        assert select_template(found, None, has_tools=False) == "d"
        assert select_template(found, None, has_tools=True) == "t"
        assert select_template(found, "tool_use", has_tools=False) == "t"
        assert select_template(found, "{{ x }}", has_tools=False) == "{{ x }}"
        with pytest.raises(ParameterError, match=r"several and no default: give one of rag"):
            select_template({"rag": "r"}, None, has_tools=False)

    def test_missing_template_error_names_the_way_out(self, folder):
        (folder / "chat_template.jinja").unlink()
        with pytest.raises(ParameterError, match=r"^chat: the model's files have no chat template .* chat_template="):
            load(folder).chat([USER])

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update(role='x') }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ namespace(__init__=1) }}",
            "{% set n = namespace(a=1) %}{% set n._b = 2 %}",
            "{% for i in range(10000000) %}{{ i }}{% endfor %}",
            "{{ raise_exception('only alternating roles') }}",
            "{{ messages[9].content }}",
            "{% for %}",
            "{{ 1 / 0 }}",
            "{% include 'secrets' %}",
            "{{ 'a' * 200000000 }}",
        ],
    )
    def test_forbidden_template_operations_raise_one_line(self, template):
        with pytest.raises(ParameterError, match=r"^chat_template: .*(give another|correct it)") as caught:
            render_chat(template, [USER])
        assert "\n" not in str(caught.value)

    def test_templates_get_only_plain_data(self):
        class Secret:
            key = "x"

        assert plain({"a": (1, True, Secret())}) == {"a": [1, True, "<Secret>"]}
        assert render_chat("{{ messages[0].content.key }}", [{"role": "u", "content": Secret()}]) == ""

    def test_generation_blocks_render_their_body(self):
        text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
        assert render_chat(text, [USER, USER]) == "hi"

    def test_broken_template_has_string_format(self):
        assert content_format("{% for %}") == "string"


class TestErrors:
    @pytest.mark.parametrize(
        ("messages", "said"),
        [
            ([], "messages: must be a list of messages|an empty chat"),
            ("hi", "messages: must be a list of messages"),
            ([USER, "hi"], r"messages\[1\]: must be a dict with role"),
            ([USER, {"content": "hi"}], r"messages\[1\]: role=None"),
            ([{"role": "user", "content": 5}], r"messages\[0\]: content of type int"),
            ([{"role": "user", "content": [{"type": "video"}]}], r"content\[0\]: type='video': must be text"),
            (
                [{"role": "user", "content": [{"type": "image_url"}]}],
                r"content\[0\]: an image, and the model reads none",
            ),
            ([[USER], "hi"], r"messages\[1\]: must be a list of messages"),
        ],
    )
    def test_bad_chat_error_names_the_message(self, folder, messages, said):
        with pytest.raises(ParameterError, match=said):
            list(load(folder).chat(messages))

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"continue_final_message": True}, "contradicts add_generation_prompt=True"),
            ({"chat_template": 5}, "chat_template=5: must be"),
            (
                {"chat_template_content_format": "xml"},
                "chat_template_content_format='xml': must be auto, string or openai",
            ),
            ({"chat_template_kwargs": 5}, "chat_template_kwargs=5"),
            ({"tools": "f"}, "tools='f': must be a list"),
            ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs: not supported"),
            ({"tokenization_kwargs": {"truncation": True}}, "'truncation' is not supported"),
        ],
    )
    def test_bad_chat_argument_error_names_it(self, folder, arguments, said):
        with pytest.raises(ParameterError, match=said):
            load(folder).chat([USER], **arguments)

    def test_hidden_final_message_cannot_be_continued(self):
        chat = [USER, {"role": "assistant", "content": "x"}]
        with pytest.raises(ParameterError, match="does not show the final message"):
            render_chat("nothing", chat, add_generation_prompt=False, continue_final_message=True)

    def test_generate_with_messages_points_to_chat(self, folder):
        llm = load(folder)
        for prompts in ([USER], [[USER]], USER):
            with pytest.raises(ParameterError, match=r"call chat\(messages\) instead"):
                llm.generate(prompts)

    def test_without_a_tokenizer(self, folder):
        with pytest.raises(ParameterError, match="chat: the model has no tokenizer"):
            load(folder, skip_tokenizer_init=True).chat([USER])


class TestImages:
    def png(self):
        image = pytest.importorskip("PIL.Image").new("RGB", (2, 3), (255, 0, 0))
        file = io.BytesIO()
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def test_images_in_parts_keep_their_order(self):
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{self.png()}"}},
            {"type": "text", "text": "and"},
            {"type": "image", "image": "data:image/png;base64," + self.png()},
        ]
        read, images = read_messages([{"role": "user", "content": parts}], "openai", False, "<image>")
        assert [part["type"] for part in read[0]["content"]] == ["image", "text", "image"]
        assert [image.size for image in images] == [(2, 3), (2, 3)]
        read, _ = read_messages([{"role": "user", "content": parts}], "string", False, "<image>")
        assert read[0]["content"] == "<image>\nand\n<image>"

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("https://example.com/a.png", "nothing is fetched from the network"),
            ("/etc/passwd", "nothing is fetched from the network or from files"),
            ("data:image/png;base64,AAAA", "the image cannot be read"),
            ("data:image/png;base64,@", "the image cannot be read"),
        ],
    )
    def test_invalid_images_raise(self, url, said):
        pytest.importorskip("PIL")
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(ParameterError, match=said):
            read_messages([{"role": "user", "content": [part]}], "openai", False, "<image>")


class TestDefaults:
    def write(self, folder, **values):
        (folder / "generation_config.json").write_text(json.dumps(values))

    def test_generation_config_values_are_defaults(self, folder):
        self.write(
            folder, temperature=0.6, top_p=0.9, top_k=1, repetition_penalty=1.1, max_new_tokens=3, do_sample=True
        )
        llm = load(folder)
        expected = SamplingParams(temperature=0.6, top_p=0.9, top_k=1, repetition_penalty=1.1, max_tokens=3)
        assert llm.get_default_sampling_params() == expected
        prompt = {"prompt_token_ids": [5, 6, 7]}
        likeliest = llm.generate(prompt, SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=3))
        for outputs in (llm.generate(prompt), [list(llm.stream(prompt))[-1]]):
            assert outputs[0].outputs[0].token_ids == likeliest[0].outputs[0].token_ids
        assert len(llm.generate(prompt, SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids) == 5

    def test_defaults_can_be_disabled_replaced_or_read_elsewhere(self, folder, tmp_path_factory):
        self.write(folder, temperature=0.6, top_k=5)
        assert load(folder, generation_config="vllm").get_default_sampling_params() == SamplingParams()
        changed = load(folder, override_generation_config={"top_k": 9}).get_default_sampling_params()
        assert changed == SamplingParams(temperature=0.6, top_k=9)
        other = tmp_path_factory.mktemp("other")
        self.write(other, min_p=0.25)
        found = load(folder, generation_config=str(other)).get_default_sampling_params()
        assert found == SamplingParams(min_p=0.25)

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({}, ConfigError, r"generation_config\.json: temperature=-1: .*generation_config='vllm'"),
            ({"override_generation_config": {"top_k": "x"}, "generation_config": "vllm"}, ConfigError, "top_k='x'"),
            ({"override_generation_config": {"beams": 2}, "generation_config": "vllm"}, ConfigError, "'beams' is not"),
            ({"override_generation_config": 5}, ConfigError, "must be a mapping of generation_config.json's keys"),
            ({"generation_config": 5}, ConfigError, "generation_config=5: must be auto, vllm or a folder"),
        ],
    )
    def test_bad_default_error_names_the_value(self, folder, options, error, said):
        self.write(folder, temperature=-1)
        with pytest.raises(error, match=said):
            load(folder, **options)

    def test_missing_generation_config_raises(self, folder, tmp_path_factory):
        with pytest.raises(CheckpointError, match=r"generation_config=.* does not exist; give another folder"):
            load(folder, generation_config=str(tmp_path_factory.mktemp("empty")))


class TestCommand:
    def run(self, folder, text, *arguments):
        command = [sys.executable, "-m", "lamella", "chat", str(folder), "--device", "cpu", "--num-blocks", "64"]
        return subprocess.run(
            [*command, "--max-tokens", "4", *arguments], input=text, capture_output=True, text=True, timeout=100
        )

    def test_a_conversation(self, folder):
        lines = "hi\n\nagain\n/reset\n/system be short\nhello\n/nothing\n/help\n/exit\nunread\n"
        done = self.run(folder, lines, "--system", "first", "--temperature", "0", "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert [m["role"] for m in result["messages"]] == ["system", "user", "assistant"]
        assert result["messages"][0]["content"] == "be short" and result["messages"][1]["content"] == "hello"
        assert len(result["answers"]) == 3 and all(answer["tokens"] <= 4 for answer in result["answers"])
        assert "/nothing: no such command" in done.stderr and "/reset  " in done.stderr and "tok/s" in done.stderr

    def test_chat_command_without_template_raises_at_start(self, folder):
        (folder / "chat_template.jinja").unlink()
        done = self.run(folder, "hi\n")
        assert done.returncode == 2 and "no chat template" in done.stderr and not done.stdout

    def test_too_long_message_keeps_the_conversation(self, folder):
        done = self.run(folder, "x" * 3000 + "\n/reset\nhi\n", "--max-model-len", "64")
        assert done.returncode == 0 and "/reset starts a new conversation" in done.stderr
