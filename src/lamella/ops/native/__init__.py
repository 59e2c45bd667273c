"""Native CPU kernels: Python functions over a small C++ library.

Call :func:`available` first; if it returns False, use the portable torch code. Every kernel takes float32 or bfloat16
CPU tensors (all of one dtype), computes in float32 and rounds once at the end. Unless a docstring says otherwise,
arguments are not mutated and results are new contiguous tensors. Asserts check the invariants of callers; the contents
of index tensors (block tables, slots, lengths) are not checked.

`build.py` compiles the library, `bindings.py` loads it and declares the kernels' signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.native.bindings import available, has_tiles, kernels, why_unavailable

__all__ = [
    "add_rms_norm",
    "available",
    "decode_attention",
    "delta_rule",
    "linear",
    "linear_rows",
    "rms_norm",
    "rotary",
    "selective_scan",
    "short_conv",
    "silu_mul",
    "why_unavailable",
    "write_kv",
]


def linear_rows(dtype: torch.dtype, width: int) -> int:
    """Return the number of rows of `width` elements up to which :func:`linear` is faster than oneDNN (measured)."""
    if dtype == torch.float32:
        return 16
    return 256 if has_tiles() and width % 32 == 0 else 1


def _dense_rows(x: Tensor) -> bool:
    """Return True if all dimensions after the first are contiguous (the first may have any stride)."""
    return x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1) or x[:1].is_contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute the attention of one new token per request over its paged keys and values.

    Position p of request r is in block ``block_table[r, p // block]`` at row ``p % block``. Nothing outside the visible
    range is read. A request's result does not depend on other requests or on the number of threads.

    Args:
        q: (R, H, D), rows of any stride.
        k_cache: (P, block, KV, D) contiguous; H is a multiple of KV.
        v_cache: (P, block, KV, D) contiguous.
        block_table: (R, max_blocks) int32.
        seq_lens: (R,) int32, at least 1, including the new token, whose key and value are in the cache already.
        scale: factor of the scores.
        window: only positions greater than ``seq_len - 1 - window`` are visible; None for all.
        chunk: only positions from the last multiple of `chunk` up to ``seq_len - 1`` are visible; None for all.

    Returns:
        (R, H, D).
    """
    R, H, D = q.shape
    _, block, KV, _ = k_cache.shape
    assert q.is_cpu and q.dtype == k_cache.dtype == v_cache.dtype
    assert k_cache.shape == v_cache.shape and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert k_cache.shape[3] == D and H % KV == 0 and _dense_rows(q)
    assert (
        block_table.dtype == seq_lens.dtype == torch.int32 and block_table.is_contiguous() and seq_lens.is_contiguous()
    )
    assert block_table.shape[0] == R == seq_lens.shape[0] and scale > 0
    assert (window is None or window > 0) and (chunk is None or (chunk > 0 and window is None))
    out = q.new_empty((R, H, D))
    kernels["decode_attention", q.dtype](
        q.data_ptr(), q.stride(0), k_cache.data_ptr(), v_cache.data_ptr(), block_table.data_ptr(), block_table.shape[1],
        seq_lens.data_ptr(), out.data_ptr(), R, H, KV, D, block, scale, -1 if window is None else window,
        -1 if chunk is None else chunk, torch.get_num_threads(),
    )  # fmt: skip
    return out


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    slots: Tensor | None,
    query_start_loc: Tensor,
    positions: Tensor,
    activation: bool,
    residual: bool,
) -> Tensor:
    """Compute the depthwise causal convolution over the last W tokens of each request. **Mutates** ``state``.

    With ``c = bias + conv``, the result is ``silu(c)`` with activation, plus x with residual. Inputs before position 0
    count as zero, whatever the state holds. Splitting a request into several calls gives bitwise equal outputs and
    state.

    Args:
        x: (T, D), rows of any stride.
        weight: (D, W) of any strides; ``weight[:, W-1]`` multiplies the current token.
        bias: (D,), or None.
        state: (S, W-1, D), last dim contiguous: ring buffers of the latest inputs, position p in row p % (W-1). It is
            updated, with zeros for positions before 0. None for a history of zeros.
        slots: (R,) int64, distinct: slot of each request; None for slot r of request r.
        query_start_loc: (R+1,) int32, start of each request's tokens (at least one).
        positions: (T,) int64, absolute.
        activation: whether to apply SiLU.
        residual: whether to add x.

    Returns:
        (T, D).
    """
    (T, D), W, R = x.shape, weight.shape[1], query_start_loc.shape[0] - 1
    assert x.is_cpu and x.dtype == weight.dtype and _dense_rows(x)
    assert weight.shape[0] == D and W >= 2
    assert bias is None or (bias.dtype == x.dtype and bias.shape == (D,) and bias.is_contiguous())
    assert query_start_loc.dtype == torch.int32 and query_start_loc.is_contiguous()
    assert positions.dtype == torch.int64 and positions.shape == (T,) and positions.is_contiguous()
    assert slots is None or (slots.dtype == torch.int64 and slots.shape == (R,) and slots.is_contiguous())
    if state is not None:
        assert state.dtype == x.dtype and state.shape[1:] == (W - 1, D) and (D == 1 or state.stride(2) == 1)
    y = x.new_empty((T, D))
    kernels["short_conv", x.dtype](
        x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), weight.stride(1), _pointer(bias),
        _pointer(state), 0 if state is None else state.stride(0), 0 if state is None else state.stride(1),
        _pointer(slots), query_start_loc.data_ptr(), positions.data_ptr(), y.data_ptr(), R, D, W, activation, residual,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of ``x``.

    Args:
        x: (T, N), or (T, heads, N) for a norm per head; last dim contiguous, others of any stride.
        weight: (N,) float32.
        eps: added to the mean square.
    """
    normed = x.new_empty(x.shape)
    _run_norm(x, None, weight, eps, normed, None)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of ``x + residual`` and the sum. The sum is rounded to the dtype before it is normed.

    Args:
        x: (T, N), last dim contiguous.
        residual: (T, N), each token contiguous.
        weight: (N,) float32.
        eps: added to the mean square.
    """
    assert residual.dtype == x.dtype and residual.shape == x.shape and x.dim() == 2 and _dense_rows(residual)
    normed = x.new_empty(x.shape)
    new_residual = torch.empty_like(normed)
    _run_norm(x, residual, weight, eps, normed, new_residual)
    return normed, new_residual


def _run_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, normed: Tensor, new_residual: Tensor | None
) -> None:
    N, heads = x.shape[-1], 1 if x.dim() == 2 else x.shape[1]
    assert x.is_cpu and x.dim() in (2, 3) and (N == 1 or x.stride(-1) == 1)
    assert weight.dtype == torch.float32 and weight.shape == (N,) and weight.is_contiguous()
    kernels["add_rms_norm", x.dtype](
        x.data_ptr(), x.stride(0), 0 if heads == 1 else x.stride(1), _pointer(residual),
        0 if residual is None else residual.stride(0), weight.data_ptr(), eps, normed.data_ptr(),
        _pointer(new_residual), x.shape[0] * heads, heads, N, torch.get_num_threads(),
    )  # fmt: skip


def silu_mul(x: Tensor) -> Tensor:
    """Return ``silu(x[:, :I]) * x[:, I:]`` (T, I) of x (T, 2I), rows of any stride."""
    T, width = x.shape
    assert x.is_cpu and width % 2 == 0 and _dense_rows(x)
    y = x.new_empty((T, width // 2))
    kernels["silu_mul", x.dtype](
        x.data_ptr(), x.stride(0), y.data_ptr(), T, width // 2, torch.get_num_threads()
    )  # fmt: skip
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, fp32_out: bool = False) -> Tensor:
    """Return ``x @ weight.T + bias`` for few rows, limited by the memory bandwidth of reading the weight.

    A row's result does not depend on other rows, on their number or on the number of threads.

    Args:
        x: (M, K), rows of any stride.
        weight: (N, K) contiguous.
        bias: (N,), or None.
        fp32_out: whether to return the unrounded float32 sums.

    Returns:
        (M, N) in the dtype of x, or float32.
    """
    (M, K), N = x.shape, weight.shape[0]
    assert x.is_cpu and x.dtype == weight.dtype and _dense_rows(x)
    assert weight.shape[1] == K and weight.is_contiguous()
    assert bias is None or (bias.dtype == x.dtype and bias.shape == (N,) and bias.is_contiguous())
    y = x.new_empty((M, N), dtype=torch.float32 if fp32_out else x.dtype)
    kernels["fp32_linear" if fp32_out else "linear", x.dtype](
        x.data_ptr(), x.stride(0), weight.data_ptr(), _pointer(bias), y.data_ptr(), M, K, N, torch.get_num_threads()
    )
    return y


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rotate the first r dims of every head (RoPE) and copy the others; return new q and k.

    Args:
        q: (T, H, D), rows of any stride.
        k: (T, KV, D), rows of any stride.
        cos: (T, r/2) float32 contiguous.
        sin: (T, r/2) float32 contiguous.
        interleaved: True for pairs (2i, 2i + 1), False for pairs (i, i + r/2).
    """
    (T, H, D), KV, half = q.shape, k.shape[1], cos.shape[1]
    assert q.is_cpu and q.dtype == k.dtype and _dense_rows(q) and _dense_rows(k)
    assert k.shape == (T, KV, D) and cos.shape == sin.shape == (T, half) and 2 * half <= D
    assert cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()
    q_out, k_out = q.new_empty((T, H, D)), k.new_empty((T, KV, D))
    kernels["rotary", q.dtype](
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), cos.data_ptr(), sin.data_ptr(), q_out.data_ptr(),
        k_out.data_ptr(), T, H, KV, D, half, interleaved, torch.get_num_threads(),
    )  # fmt: skip
    return q_out, k_out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write row t of k and v to row ``slot_mapping[t]`` of the caches. **Mutates** ``k_cache`` and ``v_cache``.

    Args:
        k: (T, KV, D), rows of any stride.
        v: (T, KV, D), rows of any stride.
        k_cache: (P, block, KV, D) contiguous.
        v_cache: (P, block, KV, D) contiguous.
        slot_mapping: (T,) int64, distinct: ``block * block_size + offset``.
    """
    T, KV, D = k.shape
    assert k.is_cpu and k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
    assert v.shape == k.shape and _dense_rows(k) and _dense_rows(v)
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == (KV, D)
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    assert slot_mapping.dtype == torch.int64 and slot_mapping.shape == (T,) and slot_mapping.is_contiguous()
    kernels["write_kv", k.dtype](
        k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), k_cache.data_ptr(), v_cache.data_ptr(),
        slot_mapping.data_ptr(), T, KV * D, torch.get_num_threads(),
    )  # fmt: skip


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor | None,
    slots: Tensor | None,
    query_start_loc: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Compute ``lamella.ops.delta_rule.reference.delta_rule``. **Mutates** ``state``.

    Splitting a request into several calls gives bitwise equal outputs and state. A request's result does not depend on
    other requests or on the number of threads.

    Args:
        q: (T, HK, DK), rows of any stride, like k, v, decay and beta.
        k: (T, HK, DK).
        v: (T, HV, DV).
        decay: (T, HV) or (T, HV, DK).
        beta: (T, HV).
        a_log: (HV,) float32.
        dt_bias: (HV,) or (HV, DK) float32.
        state: (S, HV, DK, DV) float32, slots of any stride; None for zeros.
        slots: (R,) int64, distinct; None without a state.
        query_start_loc: (R+1,) int32.
        seq_lens: (R,) int32.

    Returns:
        (T, HV, DV).
    """
    (_, HK, DK), (T, HV, DV), R = q.shape, v.shape, query_start_loc.shape[0] - 1
    rows = (q, k, v, decay, beta)
    assert q.is_cpu and all(x.dtype == v.dtype and x[:1].is_contiguous() for x in rows)
    assert q.shape == k.shape == (T, HK, DK) and HV % HK == 0
    assert decay.shape[:2] == beta.shape == (T, HV) and decay.shape[2:] in ((), (DK,))
    _check_states((a_log, dt_bias), ((HV,), decay.shape[1:]), state, (HV, DK, DV), slots, query_start_loc, seq_lens)
    out = v.new_empty((T, HV, DV))
    kernels["delta_rule", v.dtype](
        *(part for x in rows for part in (x.data_ptr(), x.stride(0))), a_log.data_ptr(), dt_bias.data_ptr(),
        _pointer(state), 0 if state is None else state.stride(0), _pointer(slots), query_start_loc.data_ptr(),
        seq_lens.data_ptr(), out.data_ptr(), R, HK, HV, DK, DV, decay.dim() == 3, torch.get_num_threads(),
    )  # fmt: skip
    return out


def selective_scan(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    z: Tensor,
    a_log: Tensor,
    dt_bias: Tensor | None,
    d: Tensor,
    state: Tensor | None,
    slots: Tensor | None,
    query_start_loc: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Compute ``lamella.ops.selective_scan.reference.selective_scan``. **Mutates** ``state``.

    Results have the same invariances as those of :func:`delta_rule`.

    Args:
        x: (T, X, P), rows of any stride, like dt, b, c and z.
        dt: (T, H, P).
        b: (T, G, N).
        c: (T, H, N).
        z: (T, H, P).
        a_log: (H, P, N) float32.
        dt_bias: (H, P) float32, or None.
        d: (H, P) float32.
        state: (S, H, P, N) float32, slots of any stride; None for zeros.
        slots: (R,) int64, distinct; None without a state.
        query_start_loc: (R+1,) int32.
        seq_lens: (R,) int32.

    Returns:
        (T, H, P).
    """
    (T, H, P), N, R = dt.shape, b.shape[2], query_start_loc.shape[0] - 1
    rows, X, G = (x, dt, b, c, z), x.shape[1], b.shape[1]
    assert x.is_cpu and all(t.dtype == x.dtype and t[:1].is_contiguous() for t in rows)
    assert x.shape == (T, X, P) and b.shape == (T, G, N) and c.shape == (T, H, N) and z.shape == (T, H, P)
    assert H % X == H % G == 0
    constants = (a_log, d) if dt_bias is None else (a_log, d, dt_bias)
    _check_states(constants, ((H, P, N), (H, P), (H, P)), state, (H, P, N), slots, query_start_loc, seq_lens)
    out = x.new_empty((T, H, P))
    kernels["selective_scan", x.dtype](
        *(part for t in rows for part in (t.data_ptr(), t.stride(0))), a_log.data_ptr(), _pointer(dt_bias),
        d.data_ptr(), _pointer(state), 0 if state is None else state.stride(0), _pointer(slots),
        query_start_loc.data_ptr(), seq_lens.data_ptr(), out.data_ptr(), R, X, G, H, P, N, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _check_states(
    constants: tuple[Tensor, ...],
    shapes: tuple[tuple[int, ...], ...],
    state: Tensor | None,
    shape: tuple[int, ...],
    slots: Tensor | None,
    query_start_loc: Tensor,
    seq_lens: Tensor,
) -> None:
    for constant, wanted in zip(constants, shapes, strict=False):
        assert constant.dtype == torch.float32 and constant.is_contiguous() and constant.shape == wanted
    for bounds in (query_start_loc, seq_lens):
        assert bounds.dtype == torch.int32 and bounds.is_contiguous()
    if state is not None:
        assert state.dtype == torch.float32 and state.shape[1:] == shape and state[:1].is_contiguous()
        assert slots is not None and slots.dtype == torch.int64 and slots.is_contiguous()
        assert slots.shape == seq_lens.shape
