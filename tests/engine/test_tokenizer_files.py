"""Tokenizers from all tokenizer files of a folder, special tokens, and end-of-text tokens."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer, LlamaConfig

from helpers import hf_checkpoint
from lamella import LLM, SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import CheckpointError, ConfigError, ParameterError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
TEXT = "<|im_start|>hi<|im_end|>"


def write_tokenizer(folder: Path, *special: str, bos: str | None = None, **files: Any) -> Path:
    """Write a byte-level tokenizer with special tokens from 256 on, and further JSON files (names without .json)."""
    library = Library(models.BPE(vocab={letter: index for index, letter in enumerate(LETTERS)}, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, special=True) for text in special])
    if bos is not None:
        library.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, library.token_to_id(bos))]
        )
    folder.mkdir(exist_ok=True, parents=True)
    library.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


FILES = {
    "added_tokens.json": {"added_tokens": {"<|im_end|>": 257, "<|im_start|>": 256}},
    "added_tokens_decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "256": {"content": "<|im_start|>", "special": True},
                "257": {"content": "<|im_end|>", "special": False, "normalized": False},
            },
            "eos_token": "<|im_end|>",
        }
    },
    "special_tokens_map": {"special_tokens_map": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}},
    "additional": {"tokenizer_config": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    "extra": {"tokenizer_config": {"extra_special_tokens": ["<|im_start|>"], "pad_token": "<|im_end|>"}},
    "config and map": {
        "tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
        "special_tokens_map": {"pad_token": "<|im_end|>"},
    },
}


@pytest.mark.parametrize("files", FILES)
def test_tokens_of_other_files_are_added(tmp_path, files):
    """Ids and flags equal those that transformers reads from the folder."""
    config = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    given = {**FILES[files]}
    given["tokenizer_config"] = config["tokenizer_config"] | given.get("tokenizer_config", {})
    write_tokenizer(tmp_path, **given)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert ours is not None
    assert ours.encode(TEXT) == theirs(TEXT).input_ids and len(ours.encode(TEXT)) == 4
    assert ours.decode(ours.encode(TEXT)) == theirs.decode(theirs(TEXT).input_ids)
    assert ours.decode(ours.encode(TEXT), True) == theirs.decode(theirs(TEXT).input_ids, skip_special_tokens=True)
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{role}_token") == getattr(theirs, f"{role}_token")
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")


def test_contradicting_token_id_raises(tmp_path):
    write_tokenizer(tmp_path, "<s>", added_tokens={"<|im_end|>": 300})
    with pytest.raises(CheckpointError, match=r"gives '<\|im_end\|>' the id 300, and tokenizer.json makes it 257"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_post_processor_has_precedence_over_add_bos_token(tmp_path, bos, eos):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos, "add_eos_token": eos}
    write_tokenizer(
        tmp_path, "<s>", "</s>", bos="<s>", tokenizer_config=config | {"bos_token": "<s>", "eos_token": "</s>"}
    )
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None and ours.encode("hi") == theirs("hi").input_ids
    assert ours.encode("hi", add_special_tokens=False) == theirs("hi", add_special_tokens=False).input_ids


class TestSecondBos:
    @pytest.fixture
    def tokenizer(self, tmp_path) -> Tokenizer:
        found = Tokenizer.load(write_tokenizer(tmp_path, "<s>", "</s>", bos="<s>"))
        assert found is not None
        return found

    def test_rendered_template_gets_no_second_bos(self, tokenizer, caplog):
        with caplog.at_level(logging.INFO, "lamella"):
            assert tokenizer.encode("<s>hi") == tokenizer.encode("hi") == tokenizer.encode("<s>hi")
        assert len([r for r in caplog.records if "no second one" in r.message]) == 1

    def test_two_bos_in_the_text_are_kept(self, tokenizer):
        assert tokenizer.encode("<s><s>hi")[:3] == [256, 256, tokenizer.encode("hi")[1]]
        assert tokenizer.encode("<s><s>hi", add_special_tokens=False)[:2] == [256, 256]
        assert tokenizer.encode("</s></s>", add_special_tokens=False) == [257, 257]

    def test_no_bos_without_special_tokens(self, tokenizer):
        assert tokenizer.encode("hi", add_special_tokens=False) == tokenizer.encode("hi")[1:]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    hf_checkpoint(folder, LlamaConfig(**SIZE, eos_token_id=256))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    return write_tokenizer(
        folder,
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot|>",
        "<s>",
        bos="<s>",
        tokenizer_config={"eos_token": "<|im_end|>"},
    )


@pytest.mark.parametrize("token", [256, 257, 258])
def test_every_end_of_text_ends_a_request(model, token):
    """Token 256 is in config.json, 257 in the tokenizer, 258 in generation_config.json."""
    llm = LLM(model, num_blocks=8)
    forced = SamplingParams(temperature=0, max_tokens=5, logit_bias={token: 100.0})
    output = llm.generate("hi", forced, use_tqdm=False)[0].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason, output.text) == ([token], "stop", None, "")


def test_special_tokens_option_is_respected(model):
    llm, one = LLM(model, num_blocks=8), SamplingParams(max_tokens=1)
    plain = llm.get_tokenizer().encode("hi", add_special_tokens=False)

    def ids(prompt: Any, **options: Any) -> list[int]:
        return llm.generate([prompt], one, use_tqdm=False, **options)[0].prompt_token_ids

    assert ids("hi") == ids("<s>hi") == [259, *plain]
    assert ids({"prompt": "hi", "add_special_tokens": False}) == plain
    assert ids("hi", tokenization_kwargs={"add_special_tokens": False}) == plain
    assert ids({"prompt": "hi"}, tokenization_kwargs={"add_special_tokens": False}) == plain
    # The prompt's own word goes before.
    own = {"prompt": "hi", "add_special_tokens": True}
    assert ids(own, tokenization_kwargs={"add_special_tokens": False}) == [259, *plain]
    for wrong in ({"padding": True}, {"add_special_tokens": 1}, "no"):
        with pytest.raises(ParameterError, match=r"tokenization_kwargs|add_special_tokens"):
            ids("hi", tokenization_kwargs=wrong)


def test_another_folders_tokenizer_is_used(model, tmp_path):
    other = write_tokenizer(tmp_path / "other", "<a>", "<b>", tokenizer_config={"eos_token": "<b>"})
    llm = LLM(model, tokenizer=str(other), num_blocks=8)
    assert llm.get_tokenizer().name_or_path == str(other) and llm.get_tokenizer().eos_token_id == 257
    assert llm.engine.admission.eos_token_ids == (256, 258, 257)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        LLM(model, tokenizer=str(tmp_path), num_blocks=8)
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM(model, tokenizer=str(tmp_path / "absent"), num_blocks=8)


def test_skip_tokenizer_init_loads_no_tokenizer(model):
    llm = LLM(model, skip_tokenizer_init=True, num_blocks=8)
    assert llm.generate([1, 2], SamplingParams(max_tokens=1), use_tqdm=False)[0].outputs[0].text == ""
    with pytest.raises(ParameterError, match="give prompt_token_ids"):
        llm.generate("hi", use_tqdm=False)
    with pytest.raises(ConfigError, match="skip_tokenizer_init=True: no tokenizer was loaded"):
        llm.get_tokenizer()


def test_tokenizer_has_transformers_method_names(model):
    ours, theirs = LLM(model, num_blocks=8).get_tokenizer(), AutoTokenizer.from_pretrained(model)
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours("hi")["input_ids"] == theirs("hi").input_ids
    assert ours.convert_tokens_to_ids("<s>") == theirs.convert_tokens_to_ids("<s>")
    assert ours.convert_ids_to_tokens([71, 259]) == theirs.convert_ids_to_tokens([71, 259])
    assert ours.batch_decode([[71], [259]]) == theirs.batch_decode([[71], [259]])
    assert ours.decode(torch.tensor([71, 72])) == ours.decode([71, 72]) == theirs.decode([71, 72])
    assert ours.decode(71) == theirs.decode(71)
    assert ours.all_special_ids == [256, 257, 258, 259]
    assert ours.special_tokens_map == {"eos_token": "<|im_end|>"} and ours.chat_template is None


class TestOtherFormats:
    def test_without_transformers_the_error_names_the_extra(self, tmp_path, monkeypatch):
        (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.model is read by transformers only: pip install .*hf"
        ) as e:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(e.value)

    def test_failed_conversion_raises_one_line(self, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(b"\x00garbage")
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(CheckpointError, match=r"transformers cannot convert tokenizer\.model") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)

    def test_lfs_pointer_error_names_the_file(self, tmp_path):
        for name in ("tokenizer.model", "tokenizer.json"):
            (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
            with pytest.raises(CheckpointError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
                Tokenizer.load(tmp_path)

    def test_a_sentencepiece_model_is_converted(self, tmp_path):
        sentencepiece = pytest.importorskip("sentencepiece")
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text.txt"),
            model_prefix=str(tmp_path / "tokenizer"),
            vocab_size=290,
            model_type="bpe",
            byte_fallback=True,
        )
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
        ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert ours is not None and ours.encode("the quick fox") == theirs("the quick fox").input_ids
        assert ours.eos_token_id == theirs.eos_token_id is not None
