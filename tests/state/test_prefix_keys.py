"""Prefix keys: two keys are equal only if all tokens and images of the two prefixes are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.engine.images.reader import Image, PromptImage
from lamella.engine.requests.request import Request
from lamella.state.prefix import chain_keys, root_key
from prefix_cases import BLOCK, ROOT, TOKEN_IDS, keys_of, make_request

pytestmark = pytest.mark.unit


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TOKEN_IDS, TOKEN_IDS, st.sampled_from([ROOT, root_key("m", "cpu", "salt")]))
def test_keys_are_equal_only_for_equal_prefixes_and_roots(first, second, root):
    ours, theirs = keys_of(first), keys_of(second, root)
    assert len(ours) == len(first) // BLOCK
    for index, key in enumerate(ours):
        for other, their in enumerate(theirs):
            same = root == ROOT and first[: (index + 1) * BLOCK] == second[: (other + 1) * BLOCK]
            assert (key == their) == same
    assert len(set(ours)) == len(ours)


def test_different_models_placements_and_salts_have_different_roots():
    parts = [
        (m, p, s) for m in ("a", "b", "ab", "") for p in ("cpu", "cuda:0", "") for s in (None, "", "None", "a", "b")
    ]
    assert len({root_key(*some) for some in parts}) == len(parts)
    assert [root_key(*some) for some in parts] == [root_key(*some) for some in parts]
    assert root_key("a", "b") != root_key("ab") != root_key("a, b")


def test_block_keys_tell_large_tokens_and_block_limits_apart():
    blocks = ([1], [256], [65536], [2**31], [2**40], [0, 1], [1, 0], [0], [1, 0, 0])
    assert len({chain_keys(ROOT, ids, len(ids))[0] for ids in blocks}) == len(blocks)
    assert chain_keys(ROOT, [1, 2], 1)[1] != chain_keys(ROOT, [1, 2], 2)[0]


def test_a_chain_of_keys_continues_where_it_was_left():
    whole = chain_keys(ROOT, range(12), 3)
    first = chain_keys(ROOT, range(6), 3)
    assert len(whole) == 4 and len(set(whole)) == 4
    assert whole == first + chain_keys(first[-1], range(6, 12), 3)


def test_contents_of_blocks_change_their_keys_and_all_after():
    plain, other = chain_keys(ROOT, range(9), 3), chain_keys(ROOT, range(9), 3, lambda n: b"image" if n == 1 else b"")
    assert [a == b for a, b in zip(plain, other, strict=True)] == [True, False, False]


@given(st.integers(1, 11), st.lists(st.integers(0, 16), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_keys_of_a_growing_request_match_keys_of_its_tokens(prompt, grown):
    request = make_request("r", range(prompt))
    for count in grown:
        request.output_token_ids += range(100, 100 + count)
        everything = request.prompt_token_ids + request.output_token_ids
        whole = keys_of(everything)
        for tokens in (0, 3, 4, prompt, len(everything)):
            assert (
                request.block_keys(BLOCK, min(tokens, len(everything)))
                == whole[: min(tokens, len(everything)) // BLOCK]
            )


# Images of a prompt: number of text tokens before each, and which image; None: the same tokens without an image.
IMAGES = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 2, None])), max_size=3)
PATCHES = {0: 5, 1: 5, 2: 9, None: 5}


def with_images(parts: Sequence[tuple[int, int | None]], after: int) -> tuple[Request, list[object]]:
    """Return a request, and the meaning of each token: the token itself, or an image row."""
    token_ids: list[int] = []
    meaning: list[object] = []
    placed = []
    for before, which in parts:
        count = PATCHES[which]
        token_ids += [1] * before
        meaning += [1] * before
        if which is not None:
            image = Image(bytes([which]) * 32, [], np.arange(count), None)
            placed.append(PromptImage(image.positions + len(token_ids), image))
        token_ids += [2] * count
        meaning += [2 if which is None else (which, row) for row in range(count)]
    request = make_request("", [*token_ids, *[1] * after])
    request.attachments = tuple(placed)
    return request, [*meaning, *[1] * after]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(IMAGES, IMAGES, st.integers(0, 5))
def test_keys_are_equal_only_for_equal_tokens_and_images(first, second, after):
    (ours, meant), (theirs, others) = with_images(first, after), with_images(second, after)
    pairs = zip(ours.block_keys(BLOCK, len(meant)), theirs.block_keys(BLOCK, len(others)), strict=False)
    for stop, (key, other) in enumerate(pairs, 1):
        stop *= BLOCK
        assert (key == other) == (meant[:stop] == others[:stop])
        (*_, text) = keys_of(ours.token_ids(0, stop))
        assert (key == text) == (meant[:stop] == ours.token_ids(0, stop))


def test_a_request_without_a_root_has_no_keys():
    assert make_request("r", range(20), root=None).block_keys(BLOCK, 20) == []
