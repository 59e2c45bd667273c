"""Arithmetic for Triton kernels with few machine instructions.

In kernels that do much work per byte, the number of instructions limits the speed, and the compiler generates up to
four times more instructions for the plain expressions. Triton's interpreter has no machine instructions and uses the
plain expressions.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)) of x in fp32."""
    power = x * -1.4426950408889634  # exp(-x) = 2^power
    if _INTERPRETED:
        return 1.0 / (1.0 + tl.exp2(power))
    # More than half of the plain expression's instructions handle denormal numbers, which do not matter here.
    power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, is_pure=True, pack=1)
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) of x in fp32, with an error of a few units in the last place."""
    power = tl.exp(-tl.abs(x))
    # For a small power, 1 + power loses its low bits; four terms of the series are exact there.
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
    """Return the sums over axis 0 of two tensors of equal shape, which share their barriers."""
    if _INTERPRETED:
        return tl.sum(a, axis=0), tl.sum(b, axis=0)
    return tl.reduce((a, b), 0, _add_two)


@triton.jit
def sum_three(a, b, c):
    """Return the sums over axis 0 of three tensors of equal shape; see `sum_two`."""
    if _INTERPRETED:
        return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(c, axis=0)
    return tl.reduce((a, b, c), 0, _add_three)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return x (fp32) rounded to dtype, in fp32."""
    if _INTERPRETED or dtype != tl.bfloat16:
        return x.to(dtype).to(tl.float32)
    # Converting one number uses a slow unit, converting two uses a fast one. With zero as the second number, the result
    # is already the bit pattern of fp32.
    bits = tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, 0f00000000;", "=r,f", [x], tl.int32, is_pure=True, pack=1
    )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widened(rows):
    """Return each tensor of a tuple in fp32."""
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
