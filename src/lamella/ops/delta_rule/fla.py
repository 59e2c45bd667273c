"""Prompts through the chunked kernels of flash-linear-attention (`fla-core`), where that is installed."""

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
from lamella.ops.ragged_chunks import prefills_of, read_states

logger = logging.getLogger("lamella")

# These kernels take 1.4 to 2 ms whatever the prompts (about ten launches, most of them prepared in Python). The token
# loop takes 0.45 us for each token of a request or, where it fills the device, about 1 ps for each number of state and
# token: `benchmarks/recurrent_ops.py` on an H100 (14 heads of 64 x 64), and a model's prompts (32 of 128 x 128).
MIN_LENGTH = 4096  # tokens of a request, on the average
MIN_WORK = 1_500_000_000  # tokens times numbers of state
_OLDEST = (0, 5)  # the first release in which a key head serves several value heads

Chunked = Callable[..., tuple[Tensor, Tensor]]


def serves(v: Tensor, key_dim: int, tokens: int, requests: int) -> bool:
    """Return whether these kernels take `tokens` tokens of prompts of so many requests, v (T, HV, DV).

    They take many tokens, in a narrow dtype (they would round fp32 to tf32), and outside of a graph, whose replays have
    other lengths.
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
    """See `reference.delta_rule`, for the requests of `batch` after its decodes.

    The operands and `out` are of these requests' tokens only; logs (T, HV) or (T, HV, DK) are the logarithms of the
    decays and rates (T, HV) is sigmoid(beta), both fp32. The normed q and k are rounded to their dtype within. The host
    waits for the device once a batch, where that does not know its lengths on the host.
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
    except Exception as error:  # whatever the import of a package with kernels raises: there is another way
        logger.warning("fla-core is not used (%s): long prompts of delta rule layers take much longer", error)
        return ()
    return chunk_gated_delta_rule, chunk_kda


_Prompts = tuple[RaggedBatch, Tensor, Tensor]
_recent: deque[tuple[ReferenceType[RaggedBatch], _Prompts]] = deque(maxlen=4)  # a step may have several batches


def _prompts(batch: RaggedBatch) -> _Prompts:
    """The batch without its decodes, and the bounds of its requests on the device and on the host.

    Made once for all layers of a step: the device need not be asked again, and fla keeps, for the last few tensors of
    bounds that it has seen, what it made of them. So a new step has to come with a new batch, and gets new tensors.
    """
    for reference, prompts in _recent:
        if reference() is batch:
            return prompts
    some = prefills_of(batch)
    bounds = some.query_start_loc.long().clone()
    lengths = batch.query_lens[batch.num_decodes :]
    on_host = torch.tensor([0, *lengths]).cumsum(0) if lengths else bounds.cpu()
    _recent.append((ref(batch), (some, bounds, on_host)))
    return some, bounds, on_host
