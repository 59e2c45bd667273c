"""Images in prompts: results equal to transformers on every path, prefix keys, memory, and errors."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import canon_checkpoint, greedy, logprobs, poisoned_llm
from image_models import PATCHES, SIDE, TOKENS, VOCAB, expected, image, image_checkpoint, image_prompt, write_tokenizer
from lamella import LLM, AsyncLLM, SamplingParams
from lamella.errors import CheckpointError, ConfigError, ParameterError
from lamella.vision.llama4_tiling import split_image

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=VOCAB, logprobs=VOCAB)
PLAIN = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=VOCAB)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the folder of a checkpoint, and its transformers model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, image_checkpoint(folder)


def copy(checkpoint, folder, tensors=None, **values):
    """Copy the checkpoint with changed tensors or config values."""
    old = json.loads((checkpoint[0] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | values))
    save_file(tensors or load_file(checkpoint[0] / "model.safetensors"), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def load(checkpoint, **options):
    return poisoned_llm(checkpoint[0], **{"dtype": "float32", "block_size": 4, "num_blocks": 200} | options)


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def prompt_logprobs(output):
    return torch.tensor([[row[i].logprob for i in range(VOCAB)] for row in output.prompt_logprobs[1:]])


def output_logprobs(output, index=0):
    return torch.tensor([[row[i].logprob for i in range(VOCAB)] for row in output.outputs[index].logprobs])


@torch.no_grad()
def assert_as_expected(checkpoint, given, output):
    tokens, logits_of = expected(checkpoint[1], given)
    assert output.prompt_token_ids == tokens
    assert output.outputs[0].token_ids == greedy(logits_of, tokens, len(output.outputs[0].token_ids))
    whole = logprobs(logits_of(torch.tensor([tokens + output.outputs[0].token_ids[:-1]])))[0]
    if output.prompt_logprobs is not None:
        assert (prompt_logprobs(output) - whole[: len(tokens) - 1]).abs().max() <= 1e-4
    assert (output_logprobs(output) - whole[len(tokens) - 1 :]).abs().max() <= 1e-4


MIXTURES = {
    "one tile": ["one tile"],
    "several tiles": ["2 x 2"],
    "several images": ["1 x 3", "one tile", "2 x 2"],
}


@pytest.mark.parametrize("kinds", MIXTURES.values(), ids=MIXTURES)
def test_logits_equal_transformers(checkpoint, kinds):
    given = image_prompt(*(image(kind, seed) for seed, kind in enumerate(kinds)))
    (output,) = generate(load(checkpoint), given)
    assert_as_expected(checkpoint, given, output)


@pytest.mark.parametrize("budget", [3, 7, 16])
def test_chunks_that_end_inside_an_image_beside_other_requests(checkpoint, budget):
    llm = load(checkpoint, max_num_batched_tokens=budget, max_num_seqs=3)
    prompts = [
        image_prompt(image("2 x 2", 1), image("one tile", 2)),
        {"prompt_token_ids": list(range(20, 50))},
        image_prompt(image("1 x 3", 3), before=0, after=0),
        image_prompt(image("one tile", 2), before=2),
    ]
    outputs = generate(llm, prompts)
    for index in (0, 2, 3):
        assert_as_expected(checkpoint, prompts[index], outputs[index])
    ids = prompts[1]["prompt_token_ids"]
    assert outputs[1].outputs[0].token_ids == greedy(lambda ids: checkpoint[1](ids).logits, ids, 6)


def test_preempted_requests_keep_their_images(checkpoint):
    prompts = [image_prompt(image("2 x 2", seed), image("one tile", seed)) for seed in range(3)]
    llm = load(checkpoint, num_blocks=20, max_num_batched_tokens=16, enable_prefix_caching=False)
    outputs = generate(llm, prompts)
    assert llm.stats()["preemptions"] > 0
    for given, output in zip(prompts, outputs, strict=True):
        assert_as_expected(checkpoint, given, output)


@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "asynchronous"])
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_and_asynchronous_steps(checkpoint, size, ahead):
    """Only rank 0 has the vision encoder. The pools are too small for all requests; prefixes hit the second time."""
    options = {"num_blocks": 20, "max_num_batched_tokens": 16, "tensor_parallel_size": size}
    llm = LLM(checkpoint[0], device="cpu", dtype="float32", block_size=4, **options)
    llm.engine.runner.async_scheduling = ahead
    prompts = [image_prompt(image("2 x 2", seed), image("one tile", seed)) for seed in range(2)]
    prompts += [{"prompt_token_ids": list(range(20, 45))}, prompts[0]]
    try:
        for params in (GREEDY, PLAIN):
            outputs = generate(llm, prompts, params)
            for index in (0, 1, 3):
                assert_as_expected(checkpoint, prompts[index], outputs[index])
        assert llm.stats()["preemptions"] > 0 and llm.stats()["prefix_hit_tokens"] > 0
    finally:
        llm.engine.close()


def test_several_completions(checkpoint):
    given = image_prompt(image())
    params = SamplingParams(n=2, temperature=1, seed=3, max_tokens=4, ignore_eos=True, logprobs=VOCAB)
    (output,) = generate(load(checkpoint), given, params)
    tokens, logits_of = expected(checkpoint[1], given)
    for index, completion in enumerate(output.outputs):
        with torch.no_grad():
            whole = logprobs(logits_of(torch.tensor([tokens + completion.token_ids[:-1]])))[0, len(tokens) - 1 :]
        assert (output_logprobs(output, index) - whole).abs().max() <= 1e-4
    assert output.outputs[0].token_ids != output.outputs[1].token_ids


def test_prefix_hits_only_with_the_same_image(checkpoint):
    llm = load(checkpoint)
    ours, other = image_prompt(image("2 x 2", 1)), image_prompt(image("2 x 2", 2))
    first, again, changed = (generate(llm, given, PLAIN)[0] for given in (ours, ours, other))
    assert (first.num_cached_tokens, changed.num_cached_tokens) == (0, 4)  # the text before has 5 tokens
    assert again.num_cached_tokens == (len(first.prompt_token_ids) - 1) // 4 * 4
    assert (output_logprobs(first) - output_logprobs(again)).abs().max() <= 1e-5
    assert (output_logprobs(first) - output_logprobs(changed)).abs().max() > 0.01
    for given, output in ((ours, again), (other, changed)):
        assert_as_expected(checkpoint, given, output)


def test_a_prefix_may_end_inside_an_image(checkpoint):
    llm, given = load(checkpoint), image_prompt(image("2 x 2", 1), between=0, after=0)
    for cached in (0, 28):
        (output,) = generate(llm, given, PLAIN)
        assert output.num_cached_tokens == cached
        assert_as_expected(checkpoint, given, output)
    assert output.prompt_token_ids[26:] == [TOKENS.image, *[TOKENS.patch] * 4, TOKENS.end]


def test_different_images_give_different_answers(checkpoint):
    llm = load(checkpoint)
    first, second = image("2 x 2", 1), image("2 x 2", 2)
    straight, swapped = generate(llm, [image_prompt(first, second), image_prompt(second, first)])
    assert straight.prompt_token_ids == swapped.prompt_token_ids
    difference = (prompt_logprobs(straight) - prompt_logprobs(swapped)).abs().amax(-1)
    at = straight.prompt_token_ids.index(TOKENS.patch)
    assert difference[:at].max() <= 1e-6 and difference[at:].max() > 0.01


def test_image_is_encoded_once_and_freed_with_its_last_request(checkpoint, monkeypatch):
    llm = load(checkpoint, max_num_batched_tokens=8)
    reader, runs = llm.engine.admission._images, []
    rows = reader.model.encode
    monkeypatch.setattr(reader.model, "encode", lambda tiles: (runs.append(len(tiles)), rows(tiles))[1])
    ours, other = image("2 x 2", 1), image("one tile", 2)
    params = SamplingParams(max_tokens=4, ignore_eos=True, n=2)
    job = llm.engine.make_job("a", image_prompt(ours, ours), params)
    assert not runs, "admission must not run the vision encoder"
    again = llm.engine.make_job("b", image_prompt(other, ours), params)
    llm.engine.add(job)
    llm.engine.add(again)
    while llm.engine.has_work:
        assert len(reader._images) == 2
        llm.engine.step()
        gc.collect()
    assert sorted(runs) == [1, 5] and not reader._images
    cancelled = llm.engine.make_job("c", image_prompt(image(seed=9)), params)
    llm.engine.add(cancelled)
    llm.engine.step()
    llm.engine.cancel("c")
    gc.collect()
    assert not reader._images


def test_pillow_arrays_and_tensors_give_equal_tokens(checkpoint):
    pixels = image("1 x 3", 4)
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    text = {"prompt": "w10 w11 <|image|> w12", "multi_modal_data": {"image": picture}}
    ids = {"prompt_token_ids": [10, 11, TOKENS.image, 12]}
    llm = load(checkpoint, enable_prefix_caching=False)
    forms = [text, *(ids | {"multi_modal_data": {"image": form}} for form in (array, array[:, ::-1][:, ::-1], pixels))]
    outputs = [generate(llm, form)[0] for form in forms]
    assert all(output.outputs == outputs[0].outputs for output in outputs)
    assert outputs[0].prompt == text["prompt"]
    gray = Image.fromarray(array[:, :, 0])
    (output,) = generate(llm, ids | {"multi_modal_data": {"image": gray}})
    given = ids | {"multi_modal_data": {"image": [pixels[:1].expand(3, -1, -1)]}}
    assert_as_expected(checkpoint, given, output)


@pytest.mark.parametrize("form", ["parts", "text"])
def test_images_of_messages(checkpoint, form):
    pixels = [image("one tile", 5), image("2 x 2", 6)]
    pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    first = [{"type": "text", "text": "w10"}, {"type": "image_url", "image_url": {"url": url}}]
    chat = [
        {"role": "user", "content": [*first, {"type": "text", "text": "w11"}]},
        {"role": "assistant", "content": "w12"},
        {"role": "user", "content": [{"type": "image", "image": pictures[1]}, {"type": "text", "text": "w13"}]},
    ]
    templates = {
        "parts": "{% for m in messages %} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %} {{ p['text'] if p['type'] == 'text' else '<|image|>' }}{% endfor %}{% endif %}"
        "{% endfor %} w20",
        "text": "{% for m in messages %} {{ m['content'] }}{% endfor %} w20",
    }
    outputs = load(checkpoint).chat(chat, GREEDY, use_tqdm=False, chat_template=templates[form])
    ids = [10, TOKENS.image, 11, 12, TOKENS.image, 13, 20]
    assert_as_expected(checkpoint, {"prompt_token_ids": ids, "multi_modal_data": {"image": pixels}}, outputs[0])


def test_later_pixel_changes_have_no_effect(checkpoint):
    llm, pixels = load(checkpoint), image()
    job = llm.engine.make_job("a", image_prompt(pixels), GREEDY)
    kept = image_prompt(pixels.clone())
    pixels.zero_()
    llm.engine.add(job)
    while not job.finished:
        llm.engine.step()
    assert_as_expected(checkpoint, kept, job.output())


def test_async_llm(checkpoint):
    given = image_prompt(image("2 x 2", 1))

    async def run():
        async with AsyncLLM(checkpoint[0], device="cpu", dtype="float32", num_blocks=50) as llm:
            results = []
            for some in (given, image_prompt(image(), image()) | {"prompt_token_ids": [5]}):
                try:
                    async for output in llm.generate(some, GREEDY):
                        last = output
                    results.append(last)
                except ParameterError as error:
                    results.append(error)
            return results

    output, error = asyncio.run(run())
    assert_as_expected(checkpoint, given, output)
    assert "2 images for 0 placeholders" in str(error)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_token_ids": [1, 2]}, r"multi_modal_data: 1 images for 0 placeholders \(<\|image\|>, token 104\)$"),
        ({"prompt": "<|image|> w2 <|image|>"}, "1 images for 2 placeholders"),
        ({"prompt_token_ids": [1, 104], "multi_modal_data": None}, "0 images for 1 placeholders"),
        ({"prompt_token_ids": [1, 104, 105]}, "token 105 stands for a part of an image"),
        ({"prompt_token_ids": [1, 105], "multi_modal_data": None}, "token 105 stands for a part of an image"),
        ({"prompt_token_ids": [104] * 3, "multi_modal_data": {"image": [image()] * 3}}, "3 images, and .* allows 2"),
        ({"multi_modal_data": {"audio": 1}}, "multi_modal_data: must be .*not of .*'audio'"),
        ({"multi_modal_data": image()}, "multi_modal_data: must be .*not of Tensor"),
        ({"multi_modal_data": {"image": "cat.png"}}, "multi_modal_data: an image is .*, not str$"),
        ({"multi_modal_data": {"image": torch.zeros(3, 8, 8)}}, r"not Tensor \(3, 8, 8\) in torch.float32"),
        ({"multi_modal_data": {"image": np.zeros((8, 8), np.uint8)}}, r"not ndarray \(8, 8\) in uint8"),
        ({"multi_modal_data": {"image": np.zeros((3, 8, 8), np.uint8)}}, r"not ndarray \(3, 8, 8\) in uint8"),
        ({"multi_modal_data": {"image": torch.zeros(3, 0, 8, dtype=torch.uint8)}}, "0 x 8 pixels"),
        ({"image": 1}, "unknown key 'image'"),
    ],
)
def test_bad_prompts_raise_one_line(limited, given, message):
    whole = {"prompt_token_ids": [1, TOKENS.image], "multi_modal_data": {"image": image()}} | given
    if "prompt" in given:
        del whole["prompt_token_ids"]
    with pytest.raises(ParameterError, match=message) as caught:
        generate(limited, whole)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def limited(checkpoint):
    return load(checkpoint, limit_mm_per_prompt={"image": 2})


def test_number_of_images_is_limited(checkpoint, limited):
    several = image_prompt(image("2 x 2"), image())
    (one,), (other,) = generate(limited, several), generate(load(checkpoint), several)
    assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_memory_is_reserved_for_the_largest_image(checkpoint):
    model = load(checkpoint).engine.admission._images.model
    side, most = model.tiling.tile, model.tiling.max_tiles
    tiles, _ = model.split_into_tiles(torch.zeros((3, side, most * side), dtype=torch.uint8))
    assert most > 1 and tiles.shape == model.largest_shape


def test_too_long_image_prompt_raises(checkpoint):
    llm = load(checkpoint, max_model_len=20)
    with pytest.raises(ParameterError, match="prompt of 42 tokens: max_model_len=20 leaves no room"):
        generate(llm, image_prompt(image("2 x 2")))


def test_vision_encoder_is_not_loaded_without_images(checkpoint, tmp_path, caplog):
    tensors = load_file(checkpoint[0] / "model.safetensors")
    tensors["vision_model.class_embedding"] = torch.zeros(1, dtype=torch.int8)  # would be refused if it were read
    folder = copy(checkpoint, tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"vision_model.class_embedding has shape \(1,\)"):
        load((folder,))
    with caplog.at_level(logging.INFO, "lamella"):
        llm = load((folder,), limit_mm_per_prompt={"image": 0})
    assert "limit_mm_per_prompt allows no images" in caplog.text
    with pytest.raises(ParameterError, match="1 images, and limit_mm_per_prompt allows 0"):
        generate(llm, image_prompt(image()))
    text = {"prompt_token_ids": [1, TOKENS.image, TOKENS.patch, 5]}  # tokens like any others
    with torch.no_grad():
        whole = logprobs(checkpoint[1].language_model(torch.tensor([text["prompt_token_ids"]])).logits)[0, :-1]
    assert (prompt_logprobs(generate(llm, text)[0]) - whole).abs().max() <= 1e-4


def test_a_file_without_vision_tensors_is_a_text_model(checkpoint, tmp_path, caplog):
    tensors = load_file(checkpoint[0] / "model.safetensors")
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
    folder = copy(checkpoint, tmp_path, text)
    with caplog.at_level(logging.INFO, "lamella"):
        llm = load((folder,))
    assert "no tensors of a vision part: served as a text model" in caplog.text
    with pytest.raises(ParameterError, match="1 images, and the model reads none"):
        generate(llm, image_prompt(image()))
    with pytest.raises(ConfigError, match=r"limit_mm_per_prompt=.*reads no images"):
        load((folder,), limit_mm_per_prompt={"image": 0})
    name = "vision_model.layernorm_pre.weight"
    with pytest.raises(CheckpointError, match=r"vision tensors missing: multi_modal_projector\.linear_1\.weight, "):
        load((copy(checkpoint, tmp_path, text | {name: tensors[name]}),))


def test_dummy_weights_include_the_vision_encoder(checkpoint, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((checkpoint[0] / name).read_bytes())
    llm = LLM(tmp_path, device="cpu", dtype="float32", num_blocks=50, load_format="dummy")
    first, second = generate(llm, [image_prompt(image(seed=1)), image_prompt(image(seed=2))])
    assert (prompt_logprobs(first) - prompt_logprobs(second)).abs().max() > 0


@pytest.mark.parametrize("limit", [{}, {"image": -1}, {"image": True}, {"image": 1, "video": 1}, 3, {"image": None}])
def test_bad_image_limits_raise(limit):
    with pytest.raises(ConfigError, match=r'limit_mm_per_prompt=.*must be \{"image": N\}'):
        LLM("x", limit_mm_per_prompt=limit)


def test_text_models_reject_images(tmp_path):
    folder = canon_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"limit_mm_per_prompt=.*reads no images"):
        LLM(folder, device="cpu", limit_mm_per_prompt={"image": 1})
    llm = LLM(folder, device="cpu", num_blocks=20)
    with pytest.raises(ParameterError, match="1 images, and the model reads none"):
        generate(llm, image_prompt(image()))
    generate(llm, {"prompt_token_ids": [1], "multi_modal_data": {"image": []}}, SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_token_index": 200092}, "image_token_index=200092: the tokenizer's <|patch|> is 105"),
        ({"boi_token_index": 101}, "boi_token_index=101: the tokenizer's <|image_start|> is 100"),
    ],
)
def test_contradicting_tokenizer_raises(checkpoint, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        load((copy(checkpoint, tmp_path, **values),))


def test_image_tokens_beyond_the_vocabulary_raise(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"<\|tile_x_separator\|>=200084: must be below vocab_size=128"):
        load((folder,))
    load((folder,), limit_mm_per_prompt={"image": 0})
    (folder / "config.json").write_text((folder / "config.json").read_text().replace(": 101,", ": 100,"))
    with pytest.raises(ConfigError, match="eoi_token_index=100: another token of images is the same"):
        load((folder,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_mean": [0.4] * 3}, "image_mean="),
        ({"size": {"height": 336, "width": 336}}, "size="),
        ({"do_resize": False}, "do_resize=False"),
    ],
)
def test_unsupported_preprocessor_raises(checkpoint, tmp_path, values, message):
    folder = copy(checkpoint, tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        load((folder,))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_tiling_follows_the_preprocessor_config(checkpoint, tmp_path, file):
    folder = copy(checkpoint, tmp_path)
    values = {"max_patches": 2, "size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "resample": 2}
    (folder / file).write_text(json.dumps(values if file.startswith("pre") else {"image_processor": values}))
    (output,) = generate(load((folder,)), image_prompt(image("2 x 2")))
    cut, (rows, columns) = split_image(image("2 x 2"), SIDE, 2)
    assert rows * columns == 2 and output.prompt_token_ids.count(TOKENS.patch) == PATCHES * len(cut)
