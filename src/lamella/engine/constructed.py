"""An engine's parts from a model that the caller has constructed."""

from __future__ import annotations

import torch

from lamella.checkpoint.loader import named_dtype
from lamella.engine.options import EngineOptions
from lamella.engine.requests.tokenizer import Tokenizer, load_tokenizer
from lamella.layers.decoder import LanguageModel


def prepare_module(
    model: LanguageModel, options: EngineOptions, device: torch.device
) -> tuple[LanguageModel, Tokenizer | None, tuple[int, ...]]:
    """Return the model ready to run, the tokenizer that the options name, and the ids that end a text.

    The model itself is moved to `device`, converted to `dtype` unless that is "auto", and set to evaluate.
    """
    model.to(device=device, dtype=None if options.dtype == "auto" else named_dtype(options.dtype))
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(options, None)
    named = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    known = (token for token in (*model.config.eos_token_ids, *named) if token < model.config.vocab_size)
    return model, tokenizer, tuple(dict.fromkeys(known))
