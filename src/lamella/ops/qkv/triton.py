"""Operations between the fused query/key/value projection and attention, in one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor
from lamella.ops.operands import ConvStep, PagedCache, QKVSteps
from lamella.ops.rms_norm.triton import row_scale
from lamella.ops.short_conv.triton import convolve, load_history, load_taps, store_history

WARPS = 2  # the norm is bitwise equal to its own kernel if a warp has at least 512 channels
_NO_NORMS, _NO_ROPE = (None, None, 0.0), (None, None, False)


def prepare_qkv(
    qkv: Tensor, steps: QKVSteps, cache: PagedCache | None = None, canon: ConvStep | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute `reference.prepare_qkv`. Rows of qkv, and heads in a row of a cache, may have any stride.

    With `canon`, the launch directly ahead in the stream may write qkv, but not positions, slots or the history.

    The result is bitwise equal to rms_norm and short_conv in Triton, followed by rotation and cache write (the norm: if
    D is a multiple of 8 and the stride of qkv's rows is a multiple of 16). Returns new contiguous tensors.
    """
    (num_heads, num_kv_heads, head_dim), norms, rope, q_scale = steps
    tokens = qkv.shape[0]
    assert qkv.shape == (tokens, (num_heads + 2 * num_kv_heads) * head_dim) and qkv.stride(1) == 1
    assert head_dim <= 256
    q_norm, k_norm, eps = norms or _NO_NORMS
    assert norms is None or all(norm.shape == (head_dim,) and norm.is_contiguous() for norm in norms[:2])
    cos, sin, interleaved = rope or _NO_ROPE
    pairs = 0 if rope is None else rope.cos.shape[1]
    if rope is not None:
        assert rope.cos.dtype == rope.sin.dtype == torch.float32 and 2 * pairs <= head_dim
        assert rope.cos.shape == rope.sin.shape == (tokens, pairs)
        assert rope.cos.is_contiguous() and rope.sin.is_contiguous()
    assert q_scale is None or (q_scale.shape == (tokens,) and q_scale.is_contiguous())
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    k = v = rows = None
    cache_strides: tuple[int, ...] = (0, 0, 0, 0)
    if cache is None:
        k, v = (torch.empty((tokens, num_kv_heads, head_dim), dtype=q.dtype, device=q.device) for _ in range(2))
    else:
        rows = cache.slot_mapping
        assert rows.shape == (tokens,) and rows.is_contiguous()
        for side in cache[:2]:
            assert side.shape[2:] == (num_kv_heads, head_dim) and side.dtype == qkv.dtype
            assert side.stride(3) == 1 and side.stride(0) == side.shape[1] * side.stride(1)
        cache_strides = *cache.k.stride()[1:3], *cache.v.stride()[1:3]
    weight = bias = history = slots = positions = None
    activation = residual = False
    conv_strides: tuple[int, ...] = (0, 0, 0, 0)
    if canon is not None:
        (weight, bias, activation, residual), (history, slots), positions = canon
        assert positions.shape == slots.shape == (tokens,) and slots.is_contiguous()
        assert weight.shape[0] == qkv.shape[1] and (bias is None or bias.is_contiguous())
        assert history.shape[1:] == (weight.shape[1] - 1, qkv.shape[1]) and history.dtype == qkv.dtype
        assert history.stride(2) == 1
        conv_strides = *weight.stride(), *history.stride()[:2]
    columns = next_power_of_2(head_dim)
    block = 512 * WARPS // columns
    programs = cdiv(tokens * num_heads, block) + 2 * cdiv(tokens * num_kv_heads, block)
    _prepare_qkv[(programs,)](
        qkv,
        q_norm,
        k_norm,
        weight,
        bias,
        history,
        slots,
        positions,
        cos,
        sin,
        q_scale,
        rows,
        q,
        k if cache is None else cache.k,
        v if cache is None else cache.v,
        tokens,
        qkv.stride(0),
        *conv_strides,
        *cache_strides,
        eps,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        D=head_dim,
        PAIRS=pairs,
        INTERLEAVED=interleaved,
        WIDTH=0 if weight is None else weight.shape[1],
        ACTIVATION=activation,
        RESIDUAL=residual,
        COLUMNS=columns,
        PAIR_COLUMNS=next_power_of_2(max(1, pairs)),
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=False,  # as in the separate kernels, for equal bits
        **dependent_launch(qkv),
    )
    return q, k, v


@triton.jit
def _load_gain(norm, column, D: tl.constexpr):
    """Return the norm weights of some columns; an empty tuple without a norm."""
    gain = ()
    if norm is not None:
        gain = (tl.load(norm + column, mask=column < D, other=0.0),)
    return gain


@triton.jit
def _finish(
    value,
    past,
    scale,
    gain,
    taps,
    history,
    stride_row,
    channel,
    mask,
    position,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Norm some channels of some heads, and convolve them after the inputs in `past`."""
    if len(gain) > 0:
        value = (value.to(tl.float32) * scale * gain[0]).to(value.dtype)
    if history is not None:
        past += (value,)
        store_history(history, stride_row, channel, mask, position, value, WIDTH)
        value = convolve(past, taps, 0, WIDTH, ACTIVATION, RESIDUAL)
    return value


@triton.jit
def _turn(first, second, cos, sin):
    """Rotate pairs of channels; round to their dtype."""
    left, right = first.to(tl.float32), second.to(tl.float32)
    return (left * cos - right * sin).to(first.dtype), (right * cos + left * sin).to(first.dtype)


@triton.jit
def _times(x, factor):
    """Return x times a factor, if there is one, rounded to its dtype."""
    if factor is not None:
        x = (x.to(tl.float32) * factor).to(x.dtype)
    return x


@triton.jit
def _prepare_heads(
    qkv,
    norm,
    weight,
    bias,
    history,
    slots,
    positions,
    cos,
    sin,
    factor,
    rows,
    out,
    program,
    num_tokens,
    stride_qkv,
    stride_channel,
    stride_tap,
    stride_slot,
    stride_row,
    stride_out,
    stride_out_head,
    eps,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIR_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Process BLOCK of a token's HEADS heads from channel FIRST on; write to the rows `rows` of `out`, or by token.

    At the end, all channels are multiplied by the token's `factor`, if there is one.
    """
    # The two halves of a rotation are loaded separately, because a pair must be in one thread. Whole heads are loaded
    # too if some channels are not rotated, and for the norm, whose sum has a fixed order.
    HALVES: tl.constexpr = PAIRS > 0 and not INTERLEAVED
    PAIR_BLOCK: tl.constexpr = COLUMNS // 2 if INTERLEAVED else PAIR_COLUMNS
    FIXED: tl.constexpr = 2 * PAIRS if HALVES else 0
    item = program * BLOCK + tl.arange(0, BLOCK)
    valid = item < num_tokens * HEADS
    row = (item // HEADS).to(tl.int64)
    inside, token, head = valid[:, None], row[:, None], (item % HEADS)[:, None]
    channel = FIRST + head * D
    column = tl.arange(0, COLUMNS)[None, :]
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    mask = inside & (column >= FIXED) & (column < D)
    pair_mask = inside & (pair < PAIRS)
    if FIXED < D:
        gain = _load_gain(norm, column, D)
        taps = load_taps(weight, bias, channel + column, mask, stride_channel, stride_tap, WIDTH)
    if HALVES:
        gain_0 = _load_gain(norm, pair, D)
        gain_1 = _load_gain(norm, pair + PAIRS, D)
        taps_0 = load_taps(weight, bias, channel + pair, pair_mask, stride_channel, stride_tap, WIDTH)
        taps_1 = load_taps(weight, bias, channel + pair + PAIRS, pair_mask, stride_channel, stride_tap, WIDTH)
    dtype: tl.constexpr = qkv.dtype.element_ty
    position = 0
    if history is not None:
        position = tl.load(positions + row, mask=valid, other=0)[:, None]
        history += tl.load(slots + row, mask=valid, other=0)[:, None] * stride_slot + channel
    if FIXED < D:
        past = load_history(history, stride_row, column, mask, position, WIDTH, dtype)
    if HALVES:
        past_0 = load_history(history, stride_row, pair, pair_mask, position, WIDTH, dtype)
        past_1 = load_history(history, stride_row, pair + PAIRS, pair_mask, position, WIDTH, dtype)
    wait_for_predecessor(PDL)

    # All loads come before the first store, so that no load waits for a store.
    if rows is not None:
        out += tl.load(rows + row, mask=valid, other=0)[:, None] * stride_out + head * stride_out_head
    else:
        out += (token * HEADS + head) * D
    if factor is not None:
        factor = tl.load(factor + row, mask=valid, other=1.0)[:, None]
    if PAIRS > 0:
        cos = tl.load(cos + token * PAIRS + pair, mask=pair_mask, other=1.0)
        sin = tl.load(sin + token * PAIRS + pair, mask=pair_mask, other=0.0)
    x = qkv + token * stride_qkv + channel
    if norm is not None:
        whole = tl.load(x + column, mask=inside & (column < D), other=0.0).to(tl.float32)
    if FIXED < D:
        value = tl.load(x + column, mask=mask, other=0.0)
    if HALVES:
        first = tl.load(x + pair, mask=pair_mask, other=0.0)
        second = tl.load(x + pair + PAIRS, mask=pair_mask, other=0.0)

    scale = 1.0
    if norm is not None:
        scale = row_scale(whole, D, eps)
    if FIXED < D:
        value = _finish(
            value, past, scale, gain, taps, history, stride_row, column, mask, position, WIDTH, ACTIVATION, RESIDUAL
        )
        if INTERLEAVED and PAIRS > 0:
            first, second = tl.split(tl.reshape(value, (BLOCK, PAIR_BLOCK, 2)))
            first, second = _turn(first, second, cos, sin)
            turned = tl.reshape(tl.join(first, second), (BLOCK, COLUMNS))
            value = tl.where(column < 2 * PAIRS, turned, value)
        tl.store(out + column, _times(value, factor), mask=mask)
    if HALVES:
        first = _finish(
            first, past_0, scale, gain_0, taps_0, history, stride_row, pair, pair_mask, position,
            WIDTH, ACTIVATION, RESIDUAL,
        )  # fmt: skip
        second = _finish(
            second, past_1, scale, gain_1, taps_1, history, stride_row, pair + PAIRS, pair_mask, position,
            WIDTH, ACTIVATION, RESIDUAL,
        )  # fmt: skip
        first, second = _turn(first, second, cos, sin)
        tl.store(out + pair, _times(first, factor), mask=pair_mask)
        tl.store(out + pair + PAIRS, _times(second, factor), mask=pair_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _prepare_qkv(
    qkv,
    q_norm,
    k_norm,
    weight,
    bias,
    history,
    slots,
    positions,
    cos,
    sin,
    q_scale,
    rows,
    q,
    k,
    v,
    num_tokens,
    stride_qkv,
    stride_channel,
    stride_tap,
    stride_slot,
    stride_row,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIR_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    q_programs = tl.cdiv(num_tokens * HEADS, BLOCK)
    kv_programs = tl.cdiv(num_tokens * KV_HEADS, BLOCK)
    KEYS: tl.constexpr = HEADS * D
    VALUES: tl.constexpr = (HEADS + KV_HEADS) * D
    # fmt: off
    if program < q_programs:
        _prepare_heads(
            qkv, q_norm, weight, bias, history, slots, positions, cos, sin, q_scale, None, q, program,
            num_tokens, stride_qkv, stride_channel, stride_tap, stride_slot, stride_row, 0, 0, eps,
            0, HEADS, D, PAIRS, INTERLEAVED, WIDTH, ACTIVATION, RESIDUAL, COLUMNS, PAIR_COLUMNS, BLOCK, PDL,
        )
    elif program < q_programs + kv_programs:
        _prepare_heads(
            qkv, k_norm, weight, bias, history, slots, positions, cos, sin, None, rows, k, program - q_programs,
            num_tokens, stride_qkv, stride_channel, stride_tap, stride_slot, stride_row, stride_k, stride_k_head, eps,
            KEYS, KV_HEADS, D, PAIRS, INTERLEAVED, WIDTH, ACTIVATION, RESIDUAL, COLUMNS, PAIR_COLUMNS, BLOCK, PDL,
        )
    else:
        _prepare_heads(
            qkv, None, weight, bias, history, slots, positions, None, None, None, rows, v,
            program - q_programs - kv_programs,
            num_tokens, stride_qkv, stride_channel, stride_tap, stride_slot, stride_row, stride_v, stride_v_head, eps,
            VALUES, KV_HEADS, D, 0, False, WIDTH, ACTIVATION, RESIDUAL, COLUMNS, PAIR_COLUMNS, BLOCK, PDL,
        )
    # fmt: on
