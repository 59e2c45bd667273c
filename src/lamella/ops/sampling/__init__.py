"""Sampling of tokens from logits on a GPU, and replacement of placeholder tokens in the next step's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lamella.ops.backend import BackendTable
from lamella.ops.sampling import reference

_placeholders = BackendTable("placeholder_tokens", __name__)

GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0: dividing by them would give the argmax too, but could overflow."""


NO_TOKEN = -1
"""Token of a row from which no token can be chosen: its logits contain NaN or +Inf, or are all -Inf."""


def placeholder_tokens(input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Replace placeholder tokens by the tokens that the previous step sampled.

    `NO_TOKEN` becomes token 0: the request has ended, and its result in this step is discarded.

    Args:
        input_ids: (T,) int64; -1 - r is the placeholder for `tokens[r]`.
        tokens: (R,) int64.

    Returns:
        (T,) int64.
    """
    return _placeholders.choose(input_ids)(input_ids, tokens)


@_placeholders.lazy("triton")
def _triton_placeholders() -> Callable[..., Tensor]:
    from lamella.ops.sampling import triton_placeholders

    return triton_placeholders.placeholder_tokens


_placeholders.backend("reference")(reference.placeholder_tokens)


def draw(logits: Tensor, sampling: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
    """Sample a token for each row of logits on a GPU. The reference is `engine.steps.sampler`.

    Args:
        logits: (R, V) fp32.
        sampling: tensors (R,) with the meanings of `SamplingParams`: seed and step int64, top_k int32, temperature,
            top_p and min_p fp32.
        out: (R,) int64, is written; None to allocate it.

    Returns:
        (R,) int64; `NO_TOKEN` for rows from which no token can be chosen.
    """
    from lamella.ops.sampling import triton

    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device) if out is None else out
    triton.sample(
        logits,
        sampling["temperature"],
        sampling["top_k"],
        sampling["top_p"],
        sampling["min_p"],
        sampling["seed"],
        sampling["step"],
        tokens,
    )
    return tokens
