"""`RaggedBatch`: requests as ranges of flat tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class RaggedBatch:
    """R requests with T new tokens in total, concatenated without padding.

    Lengths are kept twice, as tensors for kernels and as tuples for host code, so that no op must wait for the device.

    Attributes:
        positions: (T,) int64, absolute position of each new token in its request.
        query_start_loc: (R + 1,) int32, bounds of each request's new tokens.
        seq_lens: (R,) int32, tokens of each request, including the new ones.
        token_request: (T,) int64, index of each token's request.
        query_lens: R new tokens on the host; may be empty if unknown.
        context_lens: values of `seq_lens` on the host; may be empty if unknown.
        num_decodes: number of requests with exactly one new token; they come first.
    """

    positions: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    token_request: Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_decodes: int

    @classmethod
    def from_lengths(
        cls, query_lens: Sequence[int], context_lens: Sequence[int], device: torch.device | str = "cpu"
    ) -> RaggedBatch:
        """Return the batch of requests with these lengths.

        Args:
            query_lens: new tokens of each request, at least 1.
            context_lens: tokens of each request, including the new ones.
            device: device of the tensors.
        """
        assert len(query_lens) == len(context_lens) and all(
            1 <= new <= total for new, total in zip(query_lens, context_lens, strict=True)
        )
        num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
        starts = [0, *accumulate(query_lens)]
        lengths = torch.tensor(query_lens, dtype=torch.int64)
        token_request = torch.repeat_interleave(torch.arange(len(query_lens)), lengths, output_size=starts[-1])
        # position = (context - new) + (flat index - start of the request)
        shift = torch.tensor([c - n - s for c, n, s in zip(context_lens, query_lens, starts, strict=False)])
        positions = torch.arange(starts[-1]) + shift[token_request]

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return cls(
            positions=on_device(positions),
            query_start_loc=on_device(torch.tensor(starts, dtype=torch.int32)),
            seq_lens=on_device(torch.tensor(context_lens, dtype=torch.int32)),
            token_request=on_device(token_request),
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            num_decodes=num_decodes,
        )

    @classmethod
    def from_decodes(cls, positions: Tensor) -> RaggedBatch:
        """Return the batch of requests with one new token each at positions (T,), without context lengths."""
        tokens = positions.shape[0]
        index = torch.arange(tokens + 1, device=positions.device)
        return cls(
            positions=positions,
            query_start_loc=index.int(),
            seq_lens=(positions + 1).int(),
            token_request=index[:-1],
            query_lens=(1,) * tokens,
            context_lens=(),
            num_decodes=tokens,
        )

    @property
    def num_tokens(self) -> int:
        """Number of new tokens of all requests."""
        return self.positions.shape[0]

    @property
    def num_requests(self) -> int:
        """Number of requests."""
        return self.query_start_loc.shape[0] - 1
