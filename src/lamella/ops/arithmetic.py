"""Arithmetic in Triton kernels, in few instructions.

Where a kernel has much to do for each byte that it moves, the instructions take the time, and a compiler makes up to
four times more of the plain words. Triton's interpreter knows no instructions of the machine: there, those stand.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32."""
    power = x * -1.4426950408889634  # exp(-x) = 2^power
    if _INTERPRETED:
        return 1.0 / (1.0 + tl.exp2(power))
    # The plain words have more than half of their instructions for denormal numbers, which make no difference here.
    power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, is_pure=True, pack=1)
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softplus(x):
    """log(1 + exp(x)) of fp32, to a few units in the last place wherever that is not as small as them."""
    power = tl.exp(-tl.abs(x))
    # 1 + power would round away what a small one adds; four terms of the series are exact there.
    series = power * (1.0 - power * (0.5 - power * (0.3333333333 - power * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(power < 0.015625, series, tl.log(1.0 + power))


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def sum_two(a, b):
    """The sums over axis 0 of two tensors of one shape, which meet at the same barriers."""
    if _INTERPRETED:
        return tl.sum(a, axis=0), tl.sum(b, axis=0)
    return tl.reduce((a, b), 0, _add_two)


@triton.jit
def sum_three(a, b, c):
    """See `sum_two`."""
    if _INTERPRETED:
        return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(c, axis=0)
    return tl.reduce((a, b, c), 0, _add_three)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return x of fp32, rounded to dtype, in fp32."""
    if _INTERPRETED or dtype != tl.bfloat16:
        return x.to(dtype).to(tl.float32)
    # One number takes a slow unit, two take a fast one; beside a zero, the result has fp32's bits at once.
    bits = tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, 0f00000000;", "=r,f", [x], tl.int32, is_pure=True, pack=1
    )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widened(rows):
    """Each of a tuple of tensors, in fp32."""
    result = ()
    for i in tl.static_range(len(rows)):
        result += (_widened(rows[i]),)
    return result


@triton.jit
def _widened(x):
    if _INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    bits = tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.int32, is_pure=True, pack=2
    )
    return bits.to(tl.float32, bitcast=True)
