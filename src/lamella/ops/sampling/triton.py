"""Sampling of tokens from logits in two Triton launches, without sorting.

The first kernel reads the logits once, with many programs per row, and stores the maximum and the sum of weights of
every block. Greedy choice and sampling without limits need no more. The second kernel has one program per row. If
top-k, top-p or min-p limit the row, it lists the few groups of tokens whose maximum is large enough to matter, and
finds the limits among them by bisection over the bits of the logits.

Weights are fp32 and their sums fp64. The choice equals that of `sampler._draw`, except where the seventh digit decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor
from lamella.ops.sampling import GREEDY_BELOW, NO_TOKEN

_BLOCK = 4096  # tokens per program of the first kernel, and per iteration of the second
_GROUP = 64  # tokens per group, for which the first kernel stores the maximum
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_LOWEST = tl.constexpr(-(2**31))  # smaller than the key of any number
_LOG2_E = tl.constexpr(1.4426950408889634)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    step: Tensor,
    out: Tensor,
) -> None:
    """Write each row's next token to out (R,) int64, independently of other rows.

    Equal logits rank by ascending id. -inf is never chosen. A row with NaN or +inf, or with -inf only, gets `NO_TOKEN`.

    Args:
        logits: (R, V) fp32, rows of any stride.
        temperature: (R,) fp32 or fp64; greedy below `GREEDY_BELOW`.
        top_k: (R,) int32; 0 for no limit.
        top_p: (R,) fp32 or fp64; 1 for no limit.
        min_p: (R,) fp32 or fp64; 0 for no limit.
        seed: (R,) int64.
        step: (R,) int32 or int64.
        out: (R,) int64, is written.
    """
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    assert top_k.dtype == torch.int32 and seed.dtype == out.dtype == torch.int64
    assert all(values.is_contiguous() for values in (temperature, top_k, top_p, min_p, seed, step, out))
    blocks = cdiv(vocab, _BLOCK)
    groups = blocks * (_BLOCK // _GROUP)
    # For each row, one entry per block and then one per group: maxima, and likeliest tokens and a list of groups.
    maxima = logits.new_empty((rows, blocks + groups))
    indices = torch.empty_like(maxima, dtype=torch.int32)
    sums = logits.new_empty((rows, blocks), dtype=torch.float64)
    launch = dependent_launch(logits)
    common = (logits, logits.stride(0), vocab, temperature, top_k, top_p, min_p, maxima, indices, sums)
    _block_kernel[(blocks, rows)](*common, BLOCK=_BLOCK, GROUP=_GROUP, BLOCKS=blocks, num_warps=8, **launch)
    _choose_kernel[(rows,)](
        *common, seed, step, out,
        BLOCK=_BLOCK, GROUP=_GROUP, BLOCKS=blocks, PADDED_BLOCKS=next_power_of_2(blocks),
        PADDED_GROUPS=next_power_of_2(groups), num_warps=16, **launch,
    )  # fmt: skip


@triton.jit
def _ordered(x):
    """Replace NaN by +inf, which becomes the maximum of its row, and -0 by 0, so that equal numbers have equal bits."""
    return tl.where(x == 0, 0.0, tl.where(x == x, x, float("inf")))


@triton.jit
def _factors(temperature):
    """Return log2(e) / temperature as a sum of two fp32 numbers; rounded to one, it would shift all weights."""
    factor = _LOG2_E / temperature.to(tl.float64)
    high = factor.to(tl.float32)
    return high, (factor - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _weight(x, maximum, factors):
    distance = x - maximum
    return tl.where(distance > float("-inf"), tl.exp2(distance * factors[0] + distance * factors[1]), 0.0)


@triton.jit
def _limited(top_k, top_p, min_p, vocab):
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)


@triton.jit
def _block_kernel(
    logits_ptr, stride, vocab, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    maxima_ptr, indices_ptr, sums_ptr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    x = _ordered(tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=float("-inf")))
    temperature = tl.load(temperature_ptr + row)
    limited = _limited(tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), vocab)
    maximum = tl.max(x)
    GROUPS: tl.constexpr = BLOCK // GROUP
    at = row * (BLOCKS * (1 + GROUPS))
    tl.store(maxima_ptr + at + block, maximum)
    tl.store(indices_ptr + at + block, tl.min(tl.where(x == maximum, ids, vocab)))
    if temperature >= _GREEDY_BELOW:
        weights = _weight(x, maximum, _factors(temperature))
        tl.store(sums_ptr + row * BLOCKS + block, tl.sum(weights.to(tl.float64)))
        if limited:
            group_maxima = tl.max(tl.reshape(x, (GROUPS, GROUP)), axis=1)
            tl.store(maxima_ptr + at + BLOCKS + block * GROUPS + tl.arange(0, GROUPS), group_maxima)


@triton.jit
def _choose_kernel(
    logits_ptr, stride, vocab, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    maxima_ptr, indices_ptr, sums_ptr, seed_ptr, step_ptr, out_ptr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    blocks = tl.arange(0, PADDED_BLOCKS)
    wait_for_predecessor(PDL)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row).to(tl.float64)
    min_p = tl.load(min_p_ptr + row).to(tl.float64)
    u = _uniform(tl.load(seed_ptr + row), tl.load(step_ptr + row))
    GROUPS: tl.constexpr = BLOCKS * (BLOCK // GROUP)
    maxima_ptr += row * (BLOCKS + GROUPS)
    indices_ptr += row * (BLOCKS + GROUPS)
    maxima = tl.load(maxima_ptr + blocks, mask=blocks < BLOCKS, other=float("-inf"))
    likeliest = tl.load(indices_ptr + blocks, mask=blocks < BLOCKS, other=vocab)
    sums = tl.load(sums_ptr + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=0.0)
    maximum = tl.max(maxima)
    greedy = tl.min(tl.where(maxima == maximum, likeliest, vocab - 1))
    token = greedy
    usable = (maximum > float("-inf")) & (maximum < float("inf"))
    if (temperature >= _GREEDY_BELOW) & usable:
        factors = _factors(temperature)
        logits_ptr += row.to(tl.int64) * stride
        sums *= _weight(maxima, maximum, factors)
        if _limited(top_k, top_p, min_p, vocab):
            token = _limited_draw(
                logits_ptr, vocab, maximum, factors, temperature, top_k, top_p, min_p, u, tl.sum(sums),
                maxima_ptr + BLOCKS, indices_ptr + BLOCKS, BLOCK, GROUP, GROUPS, PADDED_GROUPS,
            )  # fmt: skip
        else:
            target = u * tl.sum(sums)
            block = _first_above(tl.cumsum(sums), sums, target, blocks)
            before = tl.sum(tl.where(blocks < block, sums, 0.0))
            ids = block * BLOCK + tl.arange(0, BLOCK)
            x = _ordered(tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")))
            weights = _weight(x, maximum, factors).to(tl.float64)
            token = _first_above(tl.cumsum(weights), weights, target - before, ids)
        # For example, no weight was a finite number.
        token = tl.where((token >= 0) & (token < vocab), token, greedy)
    tl.store(out_ptr + row, tl.where(usable, token, _NO_TOKEN).to(tl.int64))


@triton.jit
def _first_above(sums, weights, target, ids):
    """Return the first id whose running sum of weights exceeds the target; if rounding leaves none, the last one."""
    possible = weights > 0
    first = tl.min(tl.where(possible & (sums > target), ids, 2147483647))
    return tl.minimum(first, tl.max(tl.where(possible, ids, -1)))


@triton.jit
def _uniform(seed, step):
    """Return the uniform random number of `sampler.uniform`."""
    z = _mix(_mix(seed.to(tl.uint64) + _GOLDEN) + (step.to(tl.uint64) + 1) * _GOLDEN)
    return (z >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _key(x):
    """Return an integer key that is ordered like the fp32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _limited_draw(
    logits_ptr, vocab, maximum, factors, temperature, top_k, top_p, min_p, u, total, group_maxima_ptr, candidates_ptr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
):  # fmt: skip
    """Sample among the tokens with a key above `cut`, and the first `equals` tokens with that key."""
    groups = tl.arange(0, PADDED_GROUPS)
    group_maxima = tl.load(group_maxima_ptr + groups, mask=groups < GROUPS, other=float("-inf"))
    group_keys = tl.where(groups < GROUPS, _key(group_maxima), _LOWEST)
    high = _key(maximum)
    by_rank = (top_k > 0) & (top_k < vocab)
    # Tokens below the floor cannot be chosen if
    # - the top_k-th largest group maximum is above it, because this is at most the top_k-th largest logit;
    # - min-p excludes all tokens below it;
    # - all tokens below it together have too little weight for top-p to reach them.
    # The factor 1/2 allows for rounding.
    least = min_p
    if (top_p < 1) & (min_p == 0) & (not by_rank):
        least = (1 - top_p) * total / vocab
    floor = _LOWEST
    if least > 0:
        bound = maximum.to(tl.float64) + temperature.to(tl.float64) * tl.log(least * 0.5)
        floor = _key(tl.minimum(bound, maximum.to(tl.float64)).to(tl.float32)) - 1
    if by_rank & (top_k <= GROUPS):
        low = floor
        upper = high
        while low < upper:
            middle = _middle(low, upper)
            if tl.sum((group_keys > middle).to(tl.int32)) < top_k:
                upper = middle
            else:
                low = middle + 1
        floor = tl.where(upper > floor, upper - 1, floor)
    chosen = group_keys > floor
    places = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(candidates_ptr + places, groups, mask=chosen)
    tokens = tl.sum(chosen.to(tl.int32)) * GROUP
    tl.debug_barrier()  # threads read what other threads stored

    row = (logits_ptr, vocab, candidates_ptr, tokens, maximum, factors, min_p)
    cut = floor
    equals = 0
    if by_rank:
        cut, above = _search(row, floor, high, top_k.to(tl.float64), BLOCK, GROUP, False)
        equals = tl.where(cut > floor, top_k - above.to(tl.int32), 0)
    if top_p < 1:
        if by_rank | (min_p > 0):
            total = _kept(row, cut, equals, BLOCK, GROUP)
        nucleus, above = _search(row, cut, high, top_p * total, BLOCK, GROUP, True)
        needed = tl.ceil(tl.minimum((top_p * total - above) / _weight_of_key(row, nucleus), 1e9))
        needed = tl.maximum(needed, 1.0).to(tl.int32)
        equals = tl.where(nucleus > cut, needed, tl.minimum(equals, needed))
        cut = nucleus

    target = u * _kept(row, cut, equals, BLOCK, GROUP)
    first = tl.full((), 2147483647, tl.int32)
    last = tl.full((), -1, tl.int32)
    before = tl.zeros((), tl.float64)
    seen = tl.zeros((), tl.int32)
    for tile in range(0, tokens, BLOCK):
        ids, keys, weights = _tile(row, tile, BLOCK, GROUP)
        equal = (keys == cut).to(tl.int32)
        weights = tl.where((keys > cut) | ((keys == cut) & (seen + tl.cumsum(equal) <= equals)), weights, 0.0)
        possible = weights > 0
        above_target = possible & (before + tl.cumsum(weights) > target)
        first = tl.minimum(first, tl.min(tl.where(above_target, ids, 2147483647)))
        last = tl.maximum(last, tl.max(tl.where(possible, ids, -1)))
        before += tl.sum(weights)
        seen += tl.sum(equal)
    return tl.minimum(first, last)


@triton.jit
def _middle(low, high):
    """Return the mean of two int32, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _tile(row, tile, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Return ids, keys and fp64 weights of some candidates, by ascending id."""
    logits_ptr, vocab, candidates_ptr, tokens, maximum, factors, min_p = row
    index = tile + tl.arange(0, BLOCK)
    group = tl.load(candidates_ptr + index // GROUP, mask=index < tokens, other=0)
    ids = group * GROUP + index % GROUP
    exists = (index < tokens) & (ids < vocab)
    x = _ordered(tl.load(logits_ptr + ids, mask=exists, other=float("-inf")))
    weights = _weight(x, maximum, factors).to(tl.float64)
    return ids, tl.where(exists, _key(x), _LOWEST), tl.where(weights < min_p, 0.0, weights)


@triton.jit
def _above(row, cut, BLOCK: tl.constexpr, GROUP: tl.constexpr, WEIGHTS: tl.constexpr):
    """Return the weight, or the number, of the candidates with a key above `cut`."""
    total = tl.zeros((), tl.float64)
    for tile in range(0, row[3], BLOCK):
        _, keys, weights = _tile(row, tile, BLOCK, GROUP)
        if WEIGHTS:
            total += tl.sum(tl.where(keys > cut, weights, 0.0))
        else:
            total += tl.sum((keys > cut).to(tl.int32)).to(tl.float64)
    return total


@triton.jit
def _weight_of_key(row, key):
    _, _, _, _, maximum, factors, min_p = row
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    weight = _weight(bits.to(tl.float32, bitcast=True), maximum, factors).to(tl.float64)
    return tl.where(weight < min_p, 0.0, weight)


@triton.jit
def _kept(row, cut, equals, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Return the weight of the candidates with a key above `cut` and of the first `equals` with that key."""
    return _above(row, cut, BLOCK, GROUP, True) + tl.where(equals > 0, _weight_of_key(row, cut) * equals, 0.0)


@triton.jit
def _search(row, low, high, limit, BLOCK: tl.constexpr, GROUP: tl.constexpr, WEIGHTS: tl.constexpr):
    """Return the lowest key from `low` to `high` above which there is less than `limit`, and that amount."""
    above = tl.zeros((), tl.float64)
    while low < high:
        middle = _middle(low, high)
        measure = _above(row, middle, BLOCK, GROUP, WEIGHTS)
        if measure < limit:
            high = middle
            above = measure
        else:
            low = middle + 1
    return high, above
