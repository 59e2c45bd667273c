"""Gated delta rule by matrix products: decode steps of many requests at once, and prompts in chunks.

Within a chunk, one triangular system ("WY form") gives the updates `u` of all tokens, while the token recurrence would
read the whole state for each token. Decays are sums of logarithms and never differences, so that nothing overflows or
cancels, however fast a head forgets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.delta_rule.reference import l2_norm, log_decay
from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.ragged_chunks import iterate_chunks, longest_first, read_states, split_by_kind

CHUNK = 64
BLOCK = 16  # tokens whose pairs are computed one by one instead of by a product, with a decay per key channel


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute `reference.delta_rule`. The host reads the lengths, unless every request has one new token."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
    for decode, rows, part in split_by_kind(batch):
        some = None if state is None else state.of_requests(rows)
        operands = q[rows], k[rows], v[rows], decay[rows], beta[rows], a_log, dt_bias, part, some, out[rows]
        _step(*operands) if decode else _prefill(*operands)
    return out


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None,
    out: Tensor,
) -> None:
    """Compute one new token of each request."""
    group = v.shape[1] // q.shape[1]
    queries, keys = _unit(q, k)
    product = (queries * keys).sum(-1, keepdim=True).repeat_interleave(group, 1)
    queries, keys = queries.repeat_interleave(group, 1), keys.repeat_interleave(group, 1)
    factor = log_decay(decay, a_log, dt_bias).exp()
    factor = factor[..., None] if decay.dim() == 2 else factor
    memory = read_states(batch, state, (v.shape[1], q.shape[2], v.shape[2]))
    # Read the decayed old state with key and query, in one pass.
    found = torch.stack((keys * factor, queries * factor), 2) @ memory
    update = beta.float().sigmoid()[..., None] * (v.float() - found[:, :, 0])
    out.copy_(found[:, :, 1] + product * update)
    if state is not None:
        memory = memory.mul_(factor[..., None]).flatten(0, 1)
        memory.baddbmm_(keys.flatten(0, 1)[..., None], update.flatten(0, 1)[:, None])
        state.matrix[state.slots] = memory.unflatten(0, (batch.num_requests, -1))


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None,
    out: Tensor,
) -> None:
    """Compute all requests and heads at once, chunk by chunk."""
    group = v.shape[1] // q.shape[1]
    order = longest_first(batch)
    memory = read_states(batch, state, (v.shape[1], q.shape[2], v.shape[2]))[order]
    by_channel = decay.dim() == 3
    weigh = _weigh_by_channel if by_channel else _weigh_by_head
    for chunk in iterate_chunks(batch, order, CHUNK, BLOCK if by_channel else 1):
        queries, keys = _unit(chunk.gather(q), chunk.gather(k))
        keys = chunk.zero_padding(keys)
        rate = chunk.zero_padding(chunk.gather(beta).sigmoid())[..., None]
        # Compute the decays token-major, as `log_decay` expects rate and bias along the last dimensions.
        logs = chunk.zero_padding(
            log_decay(decay[chunk.token].flatten(0, 1), a_log, dt_bias).unflatten(0, chunk.token.shape).transpose(1, 2)
        )
        seen_keys, seen_queries, since_start, until_end = weigh(queries, keys, logs, group)
        queries, keys = queries.repeat_interleave(group, 1), keys.repeat_interleave(group, 1)
        now = memory[: chunk.requests]
        right = rate * (chunk.gather(v) - (keys * since_start) @ now)
        update = torch.linalg.solve_triangular(rate * seen_keys, right, upper=False, unitriangular=True)
        chunk.scatter(out, (queries * since_start) @ now + seen_queries @ update)
        now *= since_start[:, :, -1, :, None]
        now += (keys * until_end).transpose(-1, -2) @ update
    if state is not None:
        state.matrix[state.slots[order]] = memory


def _unit(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return l2_norm(q) * q.shape[-1] ** -0.5, l2_norm(k)


# The two functions below take q and k (n, HK, C, DK), and logs (n, HV, C) or (n, HV, C, DK). They return * two matrices
# (n, HV, C, C), for x the keys (s < t) and x the queries (s <= t):   `sum_d x_t[d] k_s[d] exp(sum of the logs after s
# up to t)` for each pair of tokens s and t of a chunk. Other entries   (above the diagonal, and on the diagonal for the
# keys) are arbitrary; * the decays (n, HV, C, DK or 1) from the start of the chunk up to and including t, and after t
# to the end of the chunk.


def _weigh_by_head(q: Tensor, k: Tensor, logs: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = logs.shape[2]
    decays = logs[..., None].expand(*logs.shape, width).tril(-1).cumsum(-2).exp().tril()
    seen_keys, seen_queries = ((x @ k.transpose(-1, -2)).repeat_interleave(group, 1) * decays for x in (k, q))
    return seen_keys, seen_queries, logs.cumsum(-1).exp()[..., None], decays[:, :, -1, :, None]


def _weigh_by_channel(q: Tensor, k: Tensor, logs: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = (x.repeat_interleave(group, 1).unflatten(2, (-1, BLOCK)) for x in (q, k))
    logs = logs.unflatten(2, (-1, BLOCK))  # (n, HV, blocks, BLOCK, DK)
    blocks = logs.shape[2]
    within, rest = logs.cumsum(-2), _sum_after(logs)
    totals = within[..., -1, :]
    left_keys, left_queries, right = k * within.exp(), q * within.exp(), k * rest.exp()
    seen = logs.new_zeros(2, *logs.shape[:2], blocks, BLOCK, blocks, BLOCK)
    past = right[:, :, :0]
    for block in range(blocks):
        # Pairs in different blocks: decay to the end of the block of s, over the blocks between, and into the block of
        # t.
        if block:
            past = torch.cat((past * totals[:, :, block - 1, None, None].exp(), right[:, :, block - 1, None]), 2)
            columns = past.flatten(2, 3).transpose(-1, -2)
            for x, result in zip((left_keys, left_queries), seen, strict=True):
                result[:, :, block, :, :block] = (x[:, :, block] @ columns).unflatten(-1, (block, BLOCK))
    inner = torch.zeros_like(logs)  # the sum of the logs after token s up to the token
    diagonal = seen.diagonal(dim1=3, dim2=5)  # (2, n, HV, BLOCK, BLOCK, blocks)
    for s in range(BLOCK - 1, -1, -1):
        inner[..., s + 1 :, :] += logs[..., s + 1 : s + 2, :]
        decayed = inner[..., s:, :].exp() * k[..., s : s + 1, :]
        for x, result in zip((k, q), diagonal, strict=True):
            result[:, :, s:, s] = (x[..., s:, :] * decayed).sum(-1).transpose(-1, -2)
    seen_keys, seen_queries = seen.flatten(5, 6).flatten(3, 4)
    since_start = (within + _sum_before(totals)[..., None, :]).exp().flatten(2, 3)
    until_end = (rest + _sum_after(totals)[..., None, :]).exp().flatten(2, 3)
    return seen_keys, seen_queries, since_start, until_end


def _sum_before(x: Tensor) -> Tensor:
    """Return the sum of the rows before each row of x (..., n, D)."""
    return torch.cat((torch.zeros_like(x[..., :1, :]), x[..., :-1, :].cumsum(-2)), -2)


def _sum_after(x: Tensor) -> Tensor:
    """Return the sum of the rows after each row of x (..., n, D)."""
    return _sum_before(x.flip(-2)).flip(-2)
