"""Groups of op arguments that belong together. An op takes a whole group or None.

They are immutable and cheap to create, because some are created for every layer of a decode step. The batch itself is
`ops.ragged.RaggedBatch`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvWeights(NamedTuple):
    """Weights of a short causal convolution of C channels over W tokens, and the operations after it.

    Attributes:
        weight: (C, W), any strides; column W-1 multiplies the current token.
        bias: (C,), or None.
        activation: whether SiLU is applied to the convolution's output.
        residual: whether the input is added to the result.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: bool = False
    residual: bool = False


class ConvState(NamedTuple):
    """Latest inputs of a short convolution, by slot.

    Attributes:
        history: (slots, W-1, C), any strides: a ring buffer of inputs per slot, position p in row p % (W-1).
        slots: (R,) int64, the slot of each request.
    """

    history: Tensor
    slots: Tensor


class ConvStep(NamedTuple):
    """A short convolution with state in a step where every request has one new token.

    Attributes:
        weights: weights of the convolution.
        state: its history; `state.slots` is (T,).
        positions: (T,) int64, absolute positions of the new tokens.
    """

    weights: ConvWeights
    state: ConvState
    positions: Tensor


class RecurrentState(NamedTuple):
    """Recurrent matrices of a mixer, by slot.

    Attributes:
        matrix: (slots, ...) fp32, contiguous within a slot.
        slots: (R,) int64, the slot of each request.
    """

    matrix: Tensor
    slots: Tensor

    def of_requests(self, requests: slice) -> RecurrentState:
        """Return the state of a range of requests."""
        return RecurrentState(self.matrix, self.slots[requests])


class ResidualNorm(NamedTuple):
    """An RMS norm that first adds the residual stream.

    Attributes:
        residual: (T, N) in the input's dtype.
        weight: (N,) fp32.
        eps: added to the mean square.
    """

    residual: Tensor
    weight: Tensor
    eps: float


class HeadSizes(NamedTuple):
    """Widths of a fused query/key/value projection [q | k | v].

    Attributes:
        heads: query heads H.
        kv_heads: key/value heads KV.
        dim: channels D of a head.
    """

    heads: int
    kv_heads: int
    dim: int


class HeadNorms(NamedTuple):
    """RMS norms of each query head and each key head.

    Attributes:
        q: (D,) fp32, weight of the queries' norm.
        k: (D,) fp32, weight of the keys' norm.
        eps: added to the mean square.
    """

    q: Tensor
    k: Tensor
    eps: float


class Rope(NamedTuple):
    """Rotation (RoPE) of the first 2 * P channels of every head.

    Attributes:
        cos: (T, P) fp32.
        sin: (T, P) fp32.
        interleaved: True for pairs (2i, 2i + 1), False for pairs (i, i + P).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


class QKVSteps(NamedTuple):
    """Operations on projected queries and keys before attention. An operation that is None is skipped.

    Attributes:
        sizes: widths of the projection.
        norms: norms, applied first.
        rope: rotation, applied after the convolution if there is one.
        q_scale: (T,) fp32, factor of each token's queries, applied last.
    """

    sizes: HeadSizes
    norms: HeadNorms | None = None
    rope: Rope | None = None
    q_scale: Tensor | None = None


class PagedCache(NamedTuple):
    """Paged KV cache of one layer, with the block table and slot mapping of a step.

    Attributes:
        k: (num_blocks, block_size, KV, D).
        v: (num_blocks, block_size, KV, D).
        block_table: (R, B) int32. The token at position p of request r is in row `p % block_size` of block
            `block_table[r, p // block_size]`. Entries of blocks that no query sees may have any value.
        slot_mapping: (T,) int64, flat row `block * block_size + offset` of each new token.
    """

    k: Tensor
    v: Tensor
    block_table: Tensor
    slot_mapping: Tensor
