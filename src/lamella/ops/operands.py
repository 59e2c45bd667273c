"""Arguments of operations that travel together. Each is complete: an operation takes one of them or None.

All of them are immutable and cheap to make, since some are made for every layer of a decode step. The batch itself is
`ops.ragged.RaggedBatch`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvWeights(NamedTuple):
    """Weights of a short causal convolution of C channels over W tokens, and what follows it.

    Attributes:
        weight: (C, W), any strides; column W-1 multiplies the current token.
        bias: (C,), or None.
        activation: apply SiLU to the convolution's output.
        residual: add the input to the result.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: bool = False
    residual: bool = False


class ConvState(NamedTuple):
    """Latest inputs of a short convolution, by slot.

    Attributes:
        history: (slots, W-1, C), any strides: a ring of inputs per slot, the one at position p in row p % (W-1).
        slots: (R,) int64, the slot of each request.
    """

    history: Tensor
    slots: Tensor


class ConvStep(NamedTuple):
    """A short convolution with state in a step where every request has one new token.

    Attributes:
        weights: of the convolution.
        state: its histories; `state.slots` is (T,).
        positions: (T,) int64, absolute.
    """

    weights: ConvWeights
    state: ConvState
    positions: Tensor


class RecurrentState(NamedTuple):
    """Matrices of a recurrent mixer, by slot.

    Attributes:
        matrix: (slots, ...) fp32, contiguous within a slot.
        slots: (R,) int64, the slot of each request.
    """

    matrix: Tensor
    slots: Tensor

    def of_requests(self, requests: slice) -> RecurrentState:
        """Return the state of some of the requests."""
        return RecurrentState(self.matrix, self.slots[requests])


class ResidualNorm(NamedTuple):
    """An RMS norm that first adds the residual stream.

    Attributes:
        residual: (T, N), of the input's dtype.
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
    """Rotation of the first 2 P channels of every head.

    Attributes:
        cos: (T, P) fp32.
        sin: (T, P) fp32.
        interleaved: whether the pairs are (2i, 2i + 1); otherwise (i, i + P).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


class QKVSteps(NamedTuple):
    """Steps from projected queries and keys to those of attention. A step that is None is left out.

    Attributes:
        sizes: of the projection.
        norms: applied first.
        rope: rotation, after the convolution where there is one.
        q_scale: (T,) fp32, a factor for the queries of each token, applied last.
    """

    sizes: HeadSizes
    norms: HeadNorms | None = None
    rope: Rope | None = None
    q_scale: Tensor | None = None


class PagedCache(NamedTuple):
    """Keys and values of one layer in blocks, and where a step finds and puts its own.

    Attributes:
        k: (num_blocks, block_size, KV, D).
        v: the same for the values.
        block_table: (R, B) int32. The token at position p of request r is in row `p % block_size` of block
            `block_table[r, p // block_size]`. Entries of blocks that no query sees may be anything.
        slot_mapping: (T,) int64, the flat row `block * block_size + offset` of each new token.
    """

    k: Tensor
    v: Tensor
    block_table: Tensor
    slot_mapping: Tensor
