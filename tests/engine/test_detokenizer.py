from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from lamella.engine.requests.detokenizer import IncrementalDetokenizer
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import CheckpointError

pytestmark = pytest.mark.unit

WORDS = ["hello", "world", " hello", " world", "STOP", "ab", "bc", " a", "é", "日本", "👩", "\U0001f469\u200d"]


def finish(tokenizer):
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return Tokenizer(tokenizer)


def byte_level(splits=()):
    """Return a byte-level tokenizer with all bytes, some words, and `splits`: tokens of arbitrary bytes."""
    byte_of = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True))
    # The library's mapping of bytes to printable characters; printable bytes map to themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    char = {b: chr(b if b in printable else next(others)) for b in range(256)}
    assert set(char.values()) == set(byte_of)
    pieces = [*char.values()]
    merges = []
    for word in [*(w.encode() for w in WORDS), *splits]:
        spelled = "".join(char[b] for b in word)
        for n in range(2, len(spelled) + 1):
            merges.append((spelled[: n - 1], spelled[n - 1]))
            pieces.append(spelled[:n])
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = HFTokenizer(models.BPE(vocab, list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finish(tokenizer)


def byte_fallback(decoder=None):
    """Return a SentencePiece-like tokenizer: words with a leading U+2581, and bytes for all other characters."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters])}
    merges = []
    for word in ("▁hello", "hello", "▁world", "STOP", "▁a", "ab"):
        for n in range(2, len(word) + 1):
            merges.append((word[: n - 1], word[n - 1]))
            vocab.setdefault(word[:n], len(vocab))
    tokenizer = HFTokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finish(tokenizer)


BYTES = byte_level([b" \xf0", b"\xa9\xf0", b"\xbd\xef", b"\xef\xbf", b"a\xe2"])
PIECES = byte_fallback()
META = byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
ALL = pytest.mark.parametrize("tokenizer", [BYTES, PIECES, META], ids=["byte_level", "byte_fallback", "metaspace"])


def stream(tokenizer, ids, prompt=(), **fields):
    """Return the detokenizer after `ids`, and the pieces that it returned."""
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(max_tokens=None, **fields), prompt)
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.append(token_id))
        assert "".join(pieces) == detokenizer.text
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == detokenizer.text and detokenizer.flush() == ""
    return detokenizer, pieces


TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from([*WORDS, "👨‍👩‍👧", "🇫🇷", "e\u0301", " ", "  ", "\n", "\ufffd", "▁", "\u00a0"]).map(
            lambda w: w[0]
        ),
        st.sampled_from("ab hello日😀"),
    ),
    max_size=30,
)
WORDY = st.one_of(TEXT, st.lists(st.sampled_from([*WORDS, "👨‍👩‍👧", "🇫🇷", " ", "\ufffd"]), max_size=12).map("".join))


@ALL
@settings(max_examples=60, deadline=None)
@given(text=WORDY, at=st.integers(0, 40))
@example(text="\ufffdé😀\ufffd\ufffd\x80", at=0)
@example(text="日 \ufffd👩é", at=12)
def test_streamed_text_equals_full_decode(tokenizer, text, at):
    ids = tokenizer.encode(text)
    _, pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    whole = tokenizer.decode(ids)
    prompt, rest = ids[:at], ids[at:]
    if not tokenizer.decode(prompt).endswith("\ufffd"):
        assert tokenizer.decode(prompt) + "".join(stream(tokenizer, rest, prompt)[1]) == whole


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.integers(0, BYTES.vocab_size + 3), st.integers(128, 255)), max_size=40), st.booleans())
def test_random_bytes_equal_full_decode(ids, skip):
    _, pieces = stream(BYTES, ids, skip_special_tokens=skip)
    assert "".join(pieces) == BYTES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([BYTES.encode("\ufffd"), BYTES.encode("é"), [255], [0xE2], [0x80]]), max_size=20))
def test_replacement_characters_of_the_text_itself(parts):
    ids = [i for part in parts for i in part]
    assert "".join(stream(BYTES, ids)[1]) == BYTES.decode(ids)


@ALL
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_ids_stream_with_bounded_delay(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    detokenizer, _ = stream(tokenizer, ids, prompt=ids[::-1])
    again = IncrementalDetokenizer(tokenizer, SamplingParams(), ids[::-1])
    assert "".join(map(again.append, ids)) + again.flush() == detokenizer.text


@ALL
def test_window_stays_small(tokenizer):
    lone = tokenizer.encode("\ufffd")[-3:]
    for ids in (tokenizer.encode("hello wörld 日本 " * 60), lone * 200, lone[:1] * 600):
        detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(), ids)
        for token_id in ids:
            detokenizer.append(token_id)
            assert len(detokenizer._ids) <= 16
    assert len(detokenizer.text) >= 590


@pytest.mark.parametrize("tokenizer", [PIECES, META])
def test_leading_space_depends_on_the_prompt(tokenizer):
    hello = tokenizer.encode("hello")
    assert stream(tokenizer, hello)[0].text == "hello"
    assert stream(tokenizer, hello, tokenizer.encode("a"))[0].text == " hello"
    start = tokenizer.vocab_size - 2
    assert start in tokenizer.special_ids
    assert stream(tokenizer, hello, [start])[0].text == "hello"


@ALL
def test_characters_arrive_whole(tokenizer):
    prompt = tokenizer.encode("a")
    ids = tokenizer.encode("a😀€é")[len(prompt) :]
    part = len(tokenizer.encode("a😀")) - len(prompt) - 1
    _, pieces = stream(tokenizer, ids, prompt)
    assert [piece for piece in pieces if piece] == ["😀", "€", "é"]
    _, pieces = stream(tokenizer, ids[:part], prompt)
    assert part and pieces[:-1] == [""] * part and set(pieces[-1]) == {"\ufffd"}


def test_bytes_of_a_prompt_are_completed():
    ids = BYTES.encode("a😀b")
    assert stream(BYTES, ids[3:], ids[:3])[0].text == "😀b"


def test_broken_bytes_do_not_change_earlier_text():
    ids = [*PIECES.encode("aé"), 1 + 0xFF, *PIECES.encode("😀b")[1:]]
    _, pieces = stream(PIECES, ids)
    assert "".join(pieces) == "aé\ufffd😀b"


def test_special_tokens():
    start, end = BYTES.vocab_size - 2, BYTES.vocab_size - 1
    euro = BYTES.encode("€")
    ids = [start, *euro[:1], *[start] * 9, *euro[1:], end]
    assert stream(BYTES, ids)[0].text == "€" == BYTES.decode(ids, skip_special_tokens=True)
    assert stream(BYTES, [start, *euro, end], skip_special_tokens=False)[0].text == "<s>€</s>"


def split_everywhere(text):
    """Yield the tokens of a text that is encoded in two parts, for each division, and character by character."""
    for cut in range(len(text) + 1):
        yield [*BYTES.encode(text[:cut]), *BYTES.encode(text[cut:])]
    yield [i for c in text for i in BYTES.encode(c)]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "start", "hit"),
    [
        ("hello STOP world", "STOP", 6, "STOP"),
        ("hello STOP world", ["TOP w", "world"], 7, "TOP w"),
        ("xabcd", ["abcd", "bc"], 2, "bc"),  # the first to be complete
        ("xabcd", ["bc", "abc"], 1, "abc"),  # the longest of them
        ("aababac", "abac", 3, "abac"),
        ("日本é😀", ["é😀", "zz"], 2, "é😀"),
        ("hello", "o", 4, "o"),
        ("STOP", "STOP", 0, "STOP"),
        ("hello STO", "STOP", None, None),
        ("hello", "hello!", None, None),
    ],
)
def test_stop_strings_at_every_split(text, stop, start, hit, include):
    for ids in split_everywhere(text):
        detokenizer, pieces = stream(BYTES, ids, stop=stop, include_stop_str_in_output=include)
        expected = text if hit is None else text[:start] + (hit if include else "")
        assert (detokenizer.text, detokenizer.stop_reason) == (expected, hit)
        assert "".join(pieces) == expected
        assert detokenizer.append(ids[0]) == ("" if hit else detokenizer.pieces[-1])


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab", max_size=25),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 6),
    st.randoms(use_true_random=False),
)
def test_stop_strings_match_a_naive_search(text, stops, min_tokens, rng):
    ids = []
    ends = [0]
    while ends[-1] < len(text):
        step = rng.choice([1, 2])
        ids.extend(tokens := BYTES.encode(text[ends[-1] : ends[-1] + step]))
        ends.extend([min(ends[-1] + 1 + i, len(text)) for i in range(len(tokens))])
        ends[-1] = min(ends[-len(tokens) - 1] + step, len(text))
    floor = ends[min(min_tokens, len(ids))]
    hits = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > floor
    ]
    detokenizer, _ = stream(BYTES, ids, stop=stops, min_tokens=min_tokens)
    expected = (text[: min(hits)[1]], min(hits)[2]) if hits else (text, None)
    assert (detokenizer.text, detokenizer.stop_reason) == expected


def test_held_back_text_is_sent_once_decided():
    detokenizer = IncrementalDetokenizer(BYTES, SamplingParams(stop="abab"), [])
    letters = {c: BYTES.encode(c)[0] for c in "abx"}
    assert [detokenizer.append(letters[c]) for c in "xabax"] == ["x", "", "", "", "abax"]
    assert [detokenizer.append(letters[c]) for c in "ababx"] == ["", "", "", "", ""]
    assert detokenizer.stop_reason == "abab" and detokenizer.flush() == "" and detokenizer.text == "xabax"


def test_stop_string_before_min_tokens_is_not_held_back():
    detokenizer = IncrementalDetokenizer(BYTES, SamplingParams(stop="ab", min_tokens=3, max_tokens=8), [])
    letters = {c: BYTES.encode(c)[0] for c in "abx"}
    assert [detokenizer.append(letters[c]) for c in "ab"] == ["", "ab"]


def test_no_text_without_a_tokenizer():
    assert set(stream(None, [1, 2, 3], [4], stop="x")[1]) == {""}
    assert set(stream(BYTES, [1, 2, 3], [4], detokenize=False)[1]) == {""}


def test_tokenizer_files(tmp_path: Path):
    assert Tokenizer.load(tmp_path) is None
    hf = BYTES._tokenizer
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BYTES.vocab_size - 2)])
    hf.enable_truncation(2)
    hf.save(str(tmp_path / "tokenizer.json"))
    hf.post_processor = None
    hf.no_truncation()
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None and loaded.vocab_size == BYTES.vocab_size
    assert loaded.special_ids == {loaded.vocab_size - 2, loaded.vocab_size - 1}
    ids = loaded.encode("hello world hello")
    assert ids[0] == loaded.vocab_size - 2 and loaded.decode(ids, True) == "hello world hello"
    assert loaded.decode(ids).startswith("<s>hello")
    assert loaded.token_text(ids[0]) == "<s>" and loaded.token_text(10**6) == ""
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.load(tmp_path)


@ALL
def test_token_text_keeps_the_leading_space(tokenizer):
    world = tokenizer._tokenizer.token_to_id("Ġworld" if tokenizer is BYTES else "▁world")
    assert tokenizer.token_text(world) == " world"
