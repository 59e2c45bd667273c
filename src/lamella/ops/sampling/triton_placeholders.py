"""Replacement of placeholder tokens in one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import cdiv, dependent_launch, wait_for_predecessor

_BLOCK = 1024


def placeholder_tokens(input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Replace placeholder tokens; see `lamella.ops.sampling.placeholder_tokens`."""
    assert input_ids.dtype == tokens.dtype == torch.int64 and input_ids.is_contiguous() and tokens.is_contiguous()
    out = torch.empty_like(input_ids)
    count = input_ids.shape[0]
    _fill_in[(cdiv(count, _BLOCK),)](input_ids, tokens, out, count, BLOCK=_BLOCK, **dependent_launch(input_ids))
    return out


@triton.jit
def _fill_in(ids_ptr, tokens_ptr, out_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + index, mask=index < count, other=0)
    pending = tl.load(tokens_ptr - 1 - ids, mask=(index < count) & (ids < 0), other=0)
    tl.store(out_ptr + index, tl.where(ids < 0, tl.maximum(pending, 0), ids), mask=index < count)
