"""Tiny checkpoints of Llama 4 with a vision encoder and a tokenizer, images, and prompts that hold them."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from helpers import randomize
from lamella.vision.llama4_tiling import TEXTS, ImageTokens, split_image

VOCAB, SIDE, PATCHES = 128, 56, 4  # a tile is 56 pixels wide, and becomes 4 rows
TOKENS = ImageTokens(start=100, end=101, between_columns=102, after_row=103, image=104, patch=105)
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 40,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3,
    "interleave_moe_layer_step": 2, "attention_chunk_size": 16, "floor_scale": 24, "pad_token_id": 0,
    "max_position_embeddings": 512,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": SIDE,
    "patch_size": 14, "vision_output_dim": 40, "projector_input_dim": 40, "projector_output_dim": 40,
}  # fmt: skip
SIZES = {"one tile": (40, 50), "2 x 2": (100, 90), "1 x 3": (50, 160)}


def image_checkpoint(folder, seed=0):
    """A random one in `folder`; the transformers model."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    ids = {"boi_token_index": TOKENS.start, "eoi_token_index": TOKENS.end, "image_token_index": TOKENS.patch}
    config = Llama4Config(text_config=TEXT, vision_config=VISION, **ids)
    config._attn_implementation = "eager"
    model = Llama4ForConditionalGeneration(config).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder, **changes):
    """Words of letters and digits, and the tokens of images."""
    special = {TEXTS[name]: token for name, token in vars(TOKENS).items()} | changes
    words = {f"w{index}": index for index in range(VOCAB) if index not in special.values()}
    tokenizer = Tokenizer(WordLevel(words | special, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))


def image(kind="one tile", seed=0):
    height, width = SIZES[kind]
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def image_prompt(*images, before=5, between=3, after=7):
    """A placeholder for each image, with text around."""
    ids = list(range(10, 10 + before))
    for index in range(len(images)):
        ids += [TOKENS.image, *range(30 + index, 30 + index + between)]
    return {"prompt_token_ids": [*ids, *range(60, 60 + after)], "multi_modal_data": {"image": list(images)}}


def expected(model, given):
    """(tokens, logits of ids) as transformers has them."""
    written, tiles = [], []
    images = iter(given["multi_modal_data"]["image"])
    for token in given["prompt_token_ids"]:
        if token == TOKENS.image:
            cut, (rows, columns) = split_image(next(images), SIDE)
            tiles.append(cut.float())
            written += TOKENS.expand(rows, columns, PATCHES)
        else:
            written.append(token)
    pixels = torch.cat(tiles)
    return written, lambda ids: model(ids, pixel_values=pixels, use_cache=False).logits
