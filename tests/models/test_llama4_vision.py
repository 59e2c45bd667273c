"""Llama 4's vision encoder, tiling and image tokens equal `transformers`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4Config, Llama4ForConditionalGeneration

from helpers import randomize
from lamella.config.hf_config import HFConfig
from lamella.errors import CheckpointError, ConfigError, ParameterError
from lamella.vision.llama4_encoder import Vision, VisionConfig
from lamella.vision.llama4_tiling import ImageTokens, fit, grid, split_image

TEXT = {
    "vocab_size": 96, "hidden_size": 24, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 56,
    "patch_size": 14, "vision_output_dim": 40, "projector_input_dim": 36, "projector_output_dim": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return (folder, transformers model); the adapter has the sizes of its config."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"projector_input_dim": 40, "intermediate_size": 128}  # there, the adapter's first projection takes these
    config = Llama4Config(text_config=TEXT, vision_config=VISION | sizes)
    config._attn_implementation = "eager"
    model = Llama4ForConditionalGeneration(config).eval()
    randomize(model, 0)
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_the_vision_encoder_equals_transformers(checkpoint):
    folder, model = checkpoint
    tiles = torch.randn(3, 3, 56, 56)
    vision = Vision.from_pretrained(folder)
    expected = model.multi_modal_projector(model.get_image_features(tiles, return_dict=True).last_hidden_state)
    ours = vision(tiles)
    assert ours.shape == (3, vision.config.rows_per_tile, 24) == (3, 4, 24)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vision(tiles[1:2]), ours[1:2], rtol=1e-5, atol=1e-5)  # tiles are by themselves


def test_tensors_that_do_not_fit_are_rejected(checkpoint, tmp_path):
    tensors = load_file(checkpoint[0] / "model.safetensors")
    values = json.loads((checkpoint[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values))
    name = "vision_model.layernorm_pre.weight"
    for change, message in (
        ({name: None}, f"vision tensors missing: {name}$"),
        ({"vision_model.more": torch.zeros(1)}, "vision tensors unexpected: vision_model.more$"),
        ({name: torch.zeros(32, dtype=torch.int8)}, f"{name} is torch.int8, and no scale of it is known;"),
        ({name: torch.zeros(3)}, r"layernorm_pre.weight has shape \(3,\), the config says \(32,\)$"),
    ):
        kept = {key: tensor for key, tensor in (tensors | change).items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            Vision.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"made_up": 1}, "unknown keys .*made_up=1"),
        ({"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio=0.4"),
        ({"image_size": 57}, "vision.image_size=57"),
        ({"image_size": 42}, "vision.image_size=42"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"hidden_size": 36}, "vision.hidden_size=36"),
    ],
)
def test_invalid_vision_configs_are_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        VisionConfig.read(HFConfig({"text_config": TEXT, "vision_config": VISION | changes}))


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns", "tiles", "tokens"),
    [
        (336, 336, 1, 1, 1, 147),
        (337, 336, 2, 1, 3, 437),
        (480, 640, 2, 2, 5, 727),
        (1080, 1920, 3, 5, 16, 2322),
        (3000, 4000, 3, 4, 13, 1887),
        (10000, 300, 16, 1, 17, 2467),
        (10, 10, 1, 1, 1, 147),
    ],
)
def test_grids_tiles_and_tokens(height, width, rows, columns, tiles, tokens):
    assert grid(height, width) == (rows, columns)
    cut, shape = split_image(torch.randint(256, (3, height, width), dtype=torch.uint8))
    assert cut.shape == (tiles, 3, 336, 336) and cut.dtype == torch.bfloat16 and shape == (rows, columns)
    ids = ImageTokens()
    written = ids.expand(rows, columns, 144)
    assert len(written) == tokens and written.count(ids.patch) == 144 * tiles
    assert written[0] == ids.start and written[-1] == ids.end and written[-146] == ids.image
    if tiles > 1:
        assert written.count(ids.between_columns) == rows * (columns - 1) and written.count(ids.after_row) == rows


def test_pixels_keep_their_position_in_tiles():
    """Padding is on the right and at the bottom, and black (-1); the last tile shows the whole image."""
    image = torch.full((3, 400, 336), 255, dtype=torch.uint8)
    image[:, :, :10] = 0
    tiles, shape = split_image(image)
    assert shape == (2, 1) and tiles.shape[0] == 3
    assert (tiles[0, :, :, 10:] == 1).all() and (tiles[0, :, :, :10] == -1).all()
    assert (tiles[1, :, :64, 10:] == 1).all() and (tiles[1, :, 64:] == -1).all()
    assert (tiles[2, :, :, 20:] == 1).all() and (tiles[2, :, :, :5] == -1).all()


def test_proportions_are_kept():
    assert fit(200, 300, (450, 200)) == (133, 200)
    assert fit(800, 600, (450, 1300)) == (450, 337)
    assert fit(10000, 3, (336, 336)) == (336, 1)
    assert grid(300, 300, largest=True) == (4, 4)


def test_inputs_that_are_not_images_are_rejected():
    with pytest.raises(ParameterError, match="0 x 5 pixels"):
        grid(0, 5)
    assert grid(1, 1) == (1, 1)
    with pytest.raises(ParameterError, match="uint8"):
        split_image(torch.zeros(3, 8, 8))


def test_missing_keys_have_the_defaults_of_the_released_models():
    values = {key: VISION[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    values |= {"intermediate_size": 5632, "image_size": 336, "patch_size": 14}
    read = VisionConfig.read(HFConfig({"text_config": {}, "vision_config": values}))
    assert (read.channels, read.adapter_in, read.adapter_out, read.output_size) == (3, 4096, 4096, 5120)
    assert (read.shuffle, read.theta, read.rows_per_tile) == (2, 10000.0, 144)
