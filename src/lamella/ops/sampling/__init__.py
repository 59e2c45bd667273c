"""From logits to tokens on the device, and from one step's tokens to the next one's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lamella.ops.backend import BackendTable
from lamella.ops.sampling import reference

_pending = BackendTable("placeholder_tokens", __name__)

GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0: dividing by them would only reproduce the argmax, at a loss of range."""


NO_TOKEN = -1
"""In the place of a row's token: its logits hold NaN or +Inf, or are all -Inf, so that nothing can be chosen."""


def placeholder_tokens(input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Return input_ids (T,) int64 with tokens[r] (R,) int64 in place of each -1 - r.

    In place of `NO_TOKEN` there is token 0: the request has ended, and the step's result for it is dropped.
    """
    return _pending.choose(input_ids)(input_ids, tokens)


@_pending.lazy("triton")
def _triton_placeholders() -> Callable[..., Tensor]:
    from lamella.ops.sampling import triton_placeholders

    return triton_placeholders.placeholder_tokens


_pending.backend("reference")(reference.placeholder_tokens)


def draw(logits: Tensor, sampling: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
    """Choose a token for each row of logits (R, V) fp32 on a GPU, into `out` (R,) int64 if given.

    A row gets `NO_TOKEN` if none can be chosen. `sampling` has seed and step (R,) int64, top_k int32, temperature,
    top_p and min_p fp32, with the meanings of `SamplingParams`. The reference is `engine.steps.sampler`.
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
