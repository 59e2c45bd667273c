"""Scored sequences: bundled text, random tokens and files of prompts, and errors that name the line."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import ParameterError
from lamella.parity.sequences import TokenSequence, make_inputs, split

pytestmark = pytest.mark.unit

TEXTS = files("lamella.parity").joinpath("text.txt").read_text("utf-8").strip().split("\n\n")
VOCAB = 256
FALLBACK = "random tokens (no tokenizer that reads the bundled text)"


def word_tokenizer(words):
    library = Library(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(library)


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "prompts.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# TokenSequence and split


@pytest.mark.parametrize(("prompt", "continuation"), [(1, 1), (1, 5), (5, 1), (4, 3)])
def test_a_sequence_predicts_every_token_but_the_first(prompt, continuation):
    ids = tuple(range(10, 10 + prompt + continuation))
    sequence = TokenSequence(ids[:prompt], ids[prompt:])
    assert sequence.token_ids == ids
    assert sequence.num_predictions == len(ids) - 1
    steps = [sequence.decode_step(prediction) for prediction in range(len(ids) - 1)]
    assert steps == [0] * prompt + list(range(1, continuation))


@pytest.mark.parametrize(("prompt", "continuation"), [((), (1,)), ((1,), ()), ((), ())])
def test_a_sequence_needs_two_tokens(prompt, continuation):
    with pytest.raises(ParameterError, match="at least one prompt token and one token after it"):
        TokenSequence(prompt, continuation)


@pytest.mark.parametrize(
    ("length", "decode_len", "prompt"), [(10, 3, 7), (10, 9, 1), (10, 10, 1), (10, 99, 1), (2, 1, 1), (2, 5, 1)]
)
def test_split_takes_the_last_tokens(length, decode_len, prompt):
    ids = list(range(length))
    assert split(ids, decode_len) == TokenSequence(tuple(ids[:prompt]), tuple(ids[prompt:]))


@pytest.mark.parametrize(("ids", "decode_len"), [([], 3), ([1], 3), ([1, 2, 3], 0), ([1, 2, 3], -1)])
def test_split_leaves_no_empty_half(ids, decode_len):
    with pytest.raises(ParameterError):
        split(ids, decode_len)


# The bundled text


@pytest.mark.parametrize(("prompt_len", "decode_len"), [(64, 16), (1, 1), (5, 3), (3, 400), (10**6, 7)])
def test_bundled_text_is_read_from_its_start(tokenizer, prompt_len, decode_len):
    inputs = make_inputs(VOCAB, tokenizer, prompt_len=prompt_len, decode_len=decode_len)
    assert (inputs.source, inputs.prompt_len, inputs.decode_len) == ("bundled text", prompt_len, decode_len)
    assert len(inputs.sequences) == len(TEXTS) >= 8
    for sequence, text in zip(inputs.sequences, TEXTS, strict=True):
        ids = tokenizer.encode(text)[: prompt_len + decode_len]
        assert sequence == split(ids, decode_len)
        assert text.startswith(tokenizer.decode(sequence.token_ids).rstrip("\ufffd"))
        assert len(sequence.continuation) == min(decode_len, len(ids) - 1)
    assert max(len(sequence.token_ids) for sequence in inputs.sequences) <= prompt_len + decode_len


@pytest.mark.parametrize("count", [1, 3, 10**6, None])
def test_count_takes_the_first(tokenizer, count):
    everything = make_inputs(VOCAB, tokenizer).sequences
    assert make_inputs(VOCAB, tokenizer, count=count).sequences == everything[:count]
    ids = [[i, i + 1, i + 2] for i in range(5)]
    assert len(make_inputs(VOCAB, tokenizer, ids, count=count).sequences) == min(count or 5, 5)
    assert len(make_inputs(VOCAB, tokenizer, "random", count=min(count or 16, 99)).sequences) == min(count or 16, 99)


def test_the_seed_does_not_change_the_text(tokenizer):
    assert make_inputs(VOCAB, tokenizer, seed=1) == make_inputs(VOCAB, tokenizer, seed=2)


def test_bundled_text_stays_in_the_vocabulary(tokenizer):
    inputs = make_inputs(100, tokenizer)
    assert all(token < 100 for sequence in inputs.sequences for token in sequence.token_ids)


# Random tokens


@pytest.mark.parametrize(
    ("kind", "prompts", "source"),
    [
        ("none", None, FALLBACK),
        ("knows nothing", None, FALLBACK),
        ("empty", None, FALLBACK),
        ("none", "random", "random tokens"),
        ("bytes", "random", "random tokens"),
    ],
)
def test_random_tokens_where_the_text_cannot_be_read(tokenizer, kind, prompts, source):
    reader = {
        "none": None,
        "bytes": tokenizer,
        "knows nothing": word_tokenizer([]),
        "empty": Tokenizer(Library(models.BPE())),
    }[kind]
    inputs = make_inputs(11, reader, prompts, prompt_len=6, decode_len=3)
    assert inputs.source == source
    assert len(inputs.sequences) == 16
    assert {(len(s.prompt), len(s.continuation)) for s in inputs.sequences} == {(6, 3)}
    assert {token for s in inputs.sequences for token in s.token_ids} == set(range(11))


@pytest.mark.parametrize(("distinct", "source"), [(63, FALLBACK), (64, "bundled text")])
def test_a_tokenizer_reads_the_text_from_64_distinct_tokens_on(distinct, source):
    words = list(dict.fromkeys(word for text in TEXTS for word in text.split()))
    assert make_inputs(VOCAB, word_tokenizer(words[: distinct - 1])).source == source


def test_random_tokens_are_those_of_the_seed():
    draws = [make_inputs(1000, None, "random", count=3, seed=seed).sequences for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 3
    assert make_inputs(1000, None, count=3).sequences == draws[0]
    # More sequences begin with the same ones.
    assert make_inputs(1000, None, "random", count=5).sequences[:3] == draws[0]


# Given prompts


def test_a_file_has_a_prompt_a_line(write, tokenizer):
    texts = ["plain text", '"quoted" is text', " 5, 6", "naïve ✓"]
    lines = [
        texts[0],
        "",
        "[5, 6, 7]",
        " \t ",
        '{"prompt": "in an object"}',
        '  {"prompt_token_ids": [0, 255]}',
        *texts[1:],
        '{"prompt": [8, 9]}',
    ]
    expected = [
        tokenizer.encode(texts[0]),
        [5, 6, 7],
        tokenizer.encode("in an object"),
        [0, 255],
        *map(tokenizer.encode, texts[1:]),
        [8, 9],
    ]
    path = write("\r\n".join(lines) + "\n\n")
    for prompts in (path, str(path)):
        inputs = make_inputs(VOCAB, tokenizer, prompts, decode_len=4)
        assert inputs.source == "prompts.txt"
        assert inputs.sequences == tuple(split(ids, 4) for ids in expected)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_has_the_same_kinds(tokenizer, kind):
    prompts = kind(["text", [5, 6, 7], (8, 9), {"prompt": "object"}, {"prompt_token_ids": (1, 2)}, "[5, 6]", "random"])
    expected = [
        tokenizer.encode("text"),
        [5, 6, 7],
        [8, 9],
        tokenizer.encode("object"),
        [1, 2],
        tokenizer.encode("[5, 6]"),
        tokenizer.encode("random"),
    ]
    inputs = make_inputs(VOCAB, tokenizer, prompts, decode_len=2)
    assert inputs.source == "given prompts"
    assert inputs.sequences == tuple(split(ids, 2) for ids in expected)


def test_token_ids_need_no_tokenizer(write):
    path = write('[5, 6, 7]\n{"prompt_token_ids": [1, 2]}')
    assert [s.token_ids for s in make_inputs(10, None, path).sequences] == [(5, 6, 7), (1, 2)]


def test_long_prompts_are_cut_to_the_length():
    (sequence,) = make_inputs(100, None, [list(range(50))], prompt_len=6, decode_len=3).sequences
    assert sequence == TokenSequence(tuple(range(6)), (6, 7, 8))


@pytest.mark.parametrize("end", ["\u2028", "\x85"])
def test_json_may_hold_what_ends_a_line_elsewhere(write, tokenizer, end):
    path = write(json.dumps({"prompt": f"a{end}b"}, ensure_ascii=False))
    assert make_inputs(VOCAB, tokenizer, path).sequences[0].token_ids == tuple(tokenizer.encode(f"a{end}b"))


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(write, tokenizer):
    assert make_inputs(VOCAB, tokenizer, write("\ufeff[5, 6, 7]")).sequences[0].token_ids == (5, 6, 7)


# Errors

IDS = "must be text or token ids below 100"
KEY = "an object needs one key, prompt or prompt_token_ids"
BAD = [
    ([1, 100], IDS),
    ([-1, 1], IDS),
    ([1, True], IDS),
    ([False, 1], IDS),
    ([1, 2.0], IDS),
    ([1, "2"], IDS),
    ([1, None], IDS),
    ([[1, 2], 3], IDS),
    ([1], "1 tokens, at least 2 are needed"),
    ([], "0 tokens, at least 2 are needed"),
    ({}, KEY),
    ({"text": "a"}, KEY),
    ({"prompt": "a", "prompt_token_ids": [1, 2]}, KEY),
    ({"prompt": "a", "id": 1}, KEY),
    ({"prompt": {"prompt": "a"}}, IDS),
    ({"prompt": None}, IDS),
    ({"prompt_token_ids": 5}, IDS),
    ({"prompt_token_ids": [100, 1]}, IDS),
]


def message(*args, **kwargs):
    """Return the message of a one-line error."""
    with pytest.raises(ParameterError) as info:
        make_inputs(*args, **kwargs)
    text = str(info.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize(("entry", "why"), BAD)
def test_an_error_names_the_line(write, tokenizer, entry, why):
    path = write(f"[1, 2]\n\n  \n{json.dumps(entry)}\n[3, 4]\n")
    assert message(100, tokenizer, path) == f"{path}:4: {why}"


@pytest.mark.parametrize(("entry", "why"), [*BAD, (5, IDS), (None, IDS), (b"ab", IDS), ({1, 2}, IDS)])
def test_an_error_names_the_place_in_the_list(tokenizer, entry, why):
    assert message(100, tokenizer, [[1, 2], [3, 4], entry]) == f"prompts[2]: {why}"


@pytest.mark.parametrize("line", ["[1, 2", '{"prompt": }', "[1, 2] 3", "[INST] text", " {'prompt': 1}"])
def test_bad_json_names_the_line(write, tokenizer, line):
    path = write(f"\n[1, 2]\n{line}\n")
    assert message(VOCAB, tokenizer, path).startswith(f"{path}:3: not JSON (")


@pytest.mark.parametrize("entry", ["text", {"prompt": "text"}])
def test_text_needs_a_tokenizer(write, entry):
    why = "the model has no tokenizer.json; give token ids"
    path = write("[1, 2]\n" + (entry if isinstance(entry, str) else json.dumps(entry)))
    assert message(VOCAB, None, path) == f"{path}:2: {why}"
    assert message(VOCAB, None, [[1, 2], entry]) == f"prompts[1]: {why}"


def test_text_beyond_the_vocabulary_names_the_line(write, tokenizer):
    path = write("[1, 2]\n\xff\xff")
    assert message(10, tokenizer, path) == f"{path}:2: must be text or token ids below 10"


def test_text_of_one_token_names_the_line(write, tokenizer):
    path = write("[1, 2]\na")
    assert message(VOCAB, tokenizer, path) == f"{path}:2: 1 tokens, at least 2 are needed"


@pytest.mark.parametrize("text", ["", "\n", " \n\t\n"])
def test_an_empty_file_is_named(write, tokenizer, text):
    assert message(VOCAB, tokenizer, write(text)) == "prompts: prompts.txt is empty"


def test_no_prompts_at_all_are_refused(tokenizer):
    assert message(VOCAB, tokenizer, []) == "prompts: given prompts is empty"


def test_a_file_that_cannot_be_read_is_named(write, tmp_path, tokenizer):
    for path in (tmp_path / "missing.txt", tmp_path, write(b"\xff\xfe text")):
        for prompts in (path, str(path)):
            assert re.match(rf"prompts: {re.escape(str(path))} cannot be read \(.+\)$", message(VOCAB, None, prompts))


@pytest.mark.parametrize("name", ["prompt_len", "decode_len", "count"])
@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "3"])
@pytest.mark.parametrize("prompts", [None, "random", [[1, 2]]])
def test_lengths_and_count_are_whole_numbers_from_one(tokenizer, name, value, prompts):
    expected = f"{name}={value!r}: must be a whole number of at least 1"
    assert message(VOCAB, tokenizer, prompts, **{name: value}) == expected
