"""Check chosen tokens by the logits of one full forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def worst_gap(logits: Tensor, tokens: Sequence[int]) -> float:
    """Return how much less likely than the best token the worst of the chosen tokens is.

    Args:
        logits: (n, vocab), of the positions at which the tokens were chosen.
        tokens: the n tokens that an engine chose.

    Returns:
        The largest difference of log-probabilities, in nats. Rounding gives some hundredths, a wrong token about 3.
    """
    import torch

    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logprobs.amax(-1) - chosen).max())
