"""Delta rule of prompts through the chunked kernels of flash-linear-attention (`fla-core`), if it is installed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.ragged_chunks import read_states, select_prefills

logger = logging.getLogger("lamella")

# These kernels take 1.4 to 2 ms for any prompts (about ten launches, most of them prepared in Python). The token loop
# takes 0.45 us per token of a request or, if it fills the device, about 1 ps per state element and token. Measured by
# `benchmarks/recurrent_ops.py` on an H100 (14 heads of 64 x 64), and with a model's prompts (32 heads of 128 x 128).
MIN_LENGTH = 4096  # average tokens per request
MIN_WORK = 1_500_000_000  # tokens times state elements
_OLDEST = (0, 5)  # the first release in which several value heads share a key head

Chunked = Callable[..., tuple[Tensor, Tensor]]


def serves(v: Tensor, key_dim: int, tokens: int, requests: int) -> bool:
    """Return True if these kernels are used for prompts.

    They need many tokens, a 16-bit dtype (they would round fp32 to tf32), and no graph capture (replays have other
    lengths).

    Args:
        v: (T, HV, DV).
        key_dim: channels of a key head.
        tokens: tokens of the prompts.
        requests: number of prompts.
    """
    if tokens * v.shape[1] * key_dim * v.shape[2] < MIN_WORK and tokens < MIN_LENGTH * requests:
        return False
    if v.dtype not in (torch.bfloat16, torch.float16) or not v.is_cuda:
        return False
    return not torch.cuda.is_current_stream_capturing() and bool(_kernels())


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logs: Tensor,
    rates: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None,
    out: Tensor,
) -> None:
    """Compute `reference.delta_rule` for the requests of `batch` after its decodes.

    The kernels round the normed q and k to their dtype. The host waits for the device once per batch if the batch has
    no lengths on the host.

    Args:
        q: (T, HK, DK), tokens of these requests only, like all operands.
        k: (T, HK, DK).
        v: (T, HV, DV).
        logs: (T, HV) or (T, HV, DK) fp32, logarithms of the decays.
        rates: (T, HV) fp32, sigmoid(beta).
        batch: the whole batch.
        state: matrices (slots, HV, DK, DV), updated in place, or None.
        out: (T, HV, DV), is written.
    """
    kernels = _kernels()
    some, bounds, bounds_on_host = _prompts(batch)
    if state is not None:
        state = state.of_requests(slice(batch.num_decodes, None))
    initial = None if state is None else read_states(some, state, (v.shape[1], q.shape[2], v.shape[2]))
    y, final = kernels[logs.dim() == 3](
        q[None],
        k[None],
        v[None],
        logs[None],
        rates[None],
        initial_state=initial,
        output_final_state=state is not None,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=bounds,
        cu_seqlens_cpu=bounds_on_host,
    )
    out.copy_(y[0])
    if state is not None:
        state.matrix[state.slots] = final


@cache
def _kernels() -> tuple[Chunked, ...]:
    """Return the functions for a decay per head and for a decay per key channel; none without fla-core."""
    try:
        found = tuple(int(part) for part in version("fla-core").split(".")[:2])
        if found < _OLDEST:
            raise ImportError(f"fla-core {version('fla-core')} is older than {'.'.join(map(str, _OLDEST))}")
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda
    except Exception as error:  # importing a package with kernels can raise anything; the token loop is the fallback
        logger.warning("fla-core is not used (%s): long prompts of delta rule layers take much longer", error)
        return ()
    return chunk_gated_delta_rule, chunk_kda


_Prompts = tuple[RaggedBatch, Tensor, Tensor]
_recent: deque[tuple[ReferenceType[RaggedBatch], _Prompts]] = deque(maxlen=4)  # a step may have several batches


def _prompts(batch: RaggedBatch) -> _Prompts:
    """Return the batch without its decodes, and the bounds of its requests on the device and on the host.

    The result is cached per batch for all layers of a step. This avoids waiting for the device again. fla also caches
    its own preparations by the identity of the bounds tensor, so each new batch must get new tensors.
    """
    for reference, prompts in _recent:
        if reference() is batch:
            return prompts
    some = select_prefills(batch)
    bounds = some.query_start_loc.long().clone()
    lengths = batch.query_lens[batch.num_decodes :]
    on_host = torch.tensor([0, *lengths]).cumsum(0) if lengths else bounds.cpu()
    _recent.append((ref(batch), (some, bounds, on_host)))
    return some, bounds, on_host
