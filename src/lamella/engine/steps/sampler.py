"""Sampling: from logits to tokens.

All work is batched on the device of the logits, with one transfer of results to the host at the end. The draw of a row
depends only on its own parameters, seed and step. So a request gets the same tokens from the same logits in every
batch, and after preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lamella.engine.requests.outputs import Logprob
from lamella.engine.requests.sampling_params import SamplingParams, has_penalty, is_restricted
from lamella.ops.sampling import NO_TOKEN

_MAX_LOGITS = 1 << 24  # logits processed at a time: bounds float64 temporaries to a few hundred MiB
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Sampler inputs of the request of one row of logits.

    Attributes:
        params: sampling parameters, already validated for the vocabulary.
        seed: seed of the draws. Each of `n` completions has its own; consecutive seeds are unrelated.
        step: number of tokens sampled so far; seed and step determine the draw.
        prompt_token_ids: prompt (list, array or CPU tensor), for the repetition penalty.
        output_token_ids: tokens sampled so far (list, array or CPU tensor), for all penalties.
        eos_token_ids: end-of-sequence tokens of the model, forbidden until `min_tokens`.
    """

    params: SamplingParams
    seed: int
    step: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: Collection[int]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, from the model's logits before any processing.

    The rank of a token is 1 + the number of strictly likelier tokens; tied tokens share a rank.

    Attributes:
        token_id: the sampled (or given) token.
        logprob: its log-probability.
        rank: its rank.
        top_ids: the k likeliest tokens, likeliest first.
        top_logprobs: their log-probabilities.
        top_ranks: their ranks.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]
    top_ranks: list[int]

    def as_dict(self, token_text: Callable[[int], str | None]) -> dict[int, Logprob]:
        """Return the entries by token id, the sampled token first.

        Args:
            token_text: returns the text of a token.
        """
        entries = {self.token_id: Logprob(self.logprob, self.rank, token_text(self.token_id))}
        for token_id, logprob, rank in zip(self.top_ids, self.top_logprobs, self.top_ranks, strict=True):
            if token_id not in entries:
                entries[token_id] = Logprob(logprob, rank, token_text(token_id))
        return entries


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Sampled tokens on the host.

    Attributes:
        token_ids: one per row; `NO_TOKEN` if the logits of a row allow no token.
        logprobs: one per row; None if not requested.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Choice:
    """Sampled tokens on the device, and their asynchronous copy to the host.

    Attributes:
        tokens: (num_rows,) int64, on the device.
    """

    def __init__(
        self,
        tokens: Tensor,
        scores: Tensor | None = None,
        counts: Mapping[int, int] | None = None,
        highest: Tensor | None = None,
    ) -> None:
        """Start the copy to the host.

        Args:
            tokens: (num_rows,) int64; `NO_TOKEN` where the logits allow no token, unless `highest` is given.
            scores: result of `_score` for the rows in `counts`.
            counts: number of likeliest tokens to report, by row, for rows with log-probabilities.
            highest: (num_rows,) highest logit of each row, NaN if the row contains NaN. If it is not finite, the token
                becomes `NO_TOKEN`.
        """
        self.tokens, self._counts = tokens, counts or {}
        # Token ids are exact in float64, so one tensor transfers everything to the host.
        flat = tokens if scores is None else torch.cat([tokens.double(), scores.flatten()])
        self._host, self._highest, self._arrived = flat, highest, None
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            if highest is not None:
                self._highest = torch.empty(highest.shape, dtype=highest.dtype, pin_memory=True)
                self._highest.copy_(highest, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> SampledTokens:
        """Wait for the device, and return the tokens."""
        if self._arrived is not None:
            self._arrived.synchronize()
        flat, rows = self._host.tolist(), len(self.tokens)
        logprobs: list[TokenLogprobs | None] = [None] * rows
        width = (len(flat) - rows) // len(self._counts) if self._counts else 0
        for index, (row, count) in enumerate(self._counts.items()):
            start = rows + index * width
            logprobs[row] = _unpack(flat[start : start + width], count)
        token_ids = [int(token) for token in flat[:rows]] if self._counts else flat
        if self._highest is not None:
            for row, highest in enumerate(self._highest.tolist()):
                if not isfinite(highest):
                    token_ids[row] = NO_TOKEN
        return SampledTokens(token_ids, logprobs)


def choose(logits: Tensor, rows: Sequence[SamplingRow], draw: Callable[[Tensor], Tensor] | None = None) -> Choice:
    """Sample each row's next token. On a GPU this does not wait for the device.

    Per row, as in vLLM: logit bias, `min_tokens` mask, penalties; then the argmax if greedy, else temperature, min-p,
    top-k, top-p and a draw. Equal logits rank by ascending token id, so that top-k keeps exactly k tokens.

    Args:
        logits: (num_rows, vocab_size), any floating dtype; not modified. A row gets `NO_TOKEN` if it contains NaN or
            +Inf, or if all its logits are -Inf after processing.
        rows: sampler inputs of each row.
        draw: kernel that samples from processed float32 logits (num_rows, vocab_size); None: plain torch.

    Returns:
        The tokens, with log-probabilities of the rows that request them.
    """
    if logits.dtype == torch.float64:
        logits = logits.float()
    highest = None  # `draw` checks on the device that logits are finite
    if draw is not None:
        tokens = draw(process_logits(logits, rows))
    elif all(row.params.greedy and not is_edited(row) for row in rows):
        highest, tokens = logits.max(-1)  # NaN if the row contains one
    else:
        size = max(1, _MAX_LOGITS // logits.shape[1])
        blocks = [_sample(logits[i : i + size], rows[i : i + size]) for i in range(0, len(rows), size)]
        tokens, highest = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return with_logprobs(logits, tokens, rows, highest)


def with_logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[SamplingRow], highest: Tensor | None = None) -> Choice:
    """Return sampled tokens (num_rows,) with the log-probabilities that rows request; `highest`: see `Choice`."""
    counts = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
    if not counts:
        return Choice(tokens, highest=highest)
    if len(counts) < len(rows):
        wanted = list(counts)
        logits, some = logits[wanted], tokens[wanted]
    else:
        some = tokens
    # The score of `NO_TOKEN`, clamped to token 0, is never read.
    return Choice(tokens, _score(logits, some.clamp(min=0), max(counts.values())), counts, highest)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
    """Sample each row's next token, see `choose`, and wait for the result."""
    return choose(logits, rows).read()


def prompt_logprobs(logits: Tensor, target_ids: Tensor, k: int) -> list[TokenLogprobs]:
    """Return log-probabilities of given tokens and of the k likeliest ones.

    Args:
        logits: (num_tokens, vocab_size), any floating dtype; row t predicts `target_ids[t]`.
        target_ids: (num_tokens,) int64, on the same device.
        k: number of likeliest tokens to report, 0 <= k <= vocab_size.

    Returns:
        One entry per row.
    """
    return [_unpack(row, k) for row in _score(logits, target_ids, k).tolist()]


def uniform(seed: int, step: int) -> float:
    """Return a number in [0, 1), a multiple of 2**-53: output `step` of a splitmix64 stream keyed by the mixed seed."""
    return (_mix(_mix(seed + _GOLDEN) + (step + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def is_edited(row: SamplingRow) -> bool:
    """Return True if `process_logits` changes the row: bias, penalties, or forbidden tokens."""
    params = row.params
    changed = bool(params.logit_bias) or row.step < params.min_tokens
    return changed or has_penalty(params) or is_restricted(params)


def _sample(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
    """Return tokens (num_rows,) int64 of logits (num_rows, vocab_size), and the highest processed logit of each row."""
    x = process_logits(logits, rows)
    highest, tokens = x.max(-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if len(drawn) == len(rows):
        tokens = _draw(x, highest[:, None], rows)
    elif drawn:
        tokens[drawn] = _draw(x[drawn], highest[drawn, None], [rows[i] for i in drawn])
    return tokens, highest


def process_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply biases, penalties and forbidden tokens to logits (num_rows, vocab_size).

    Returns:
        Processed logits in float32. The input is not modified.
    """
    if not any(is_edited(row) for row in rows):
        return logits.float()
    x = logits.to(torch.float32, copy=True)
    vocab, device = x.shape[1], x.device
    biases = [(i, t, b) for i, row in enumerate(rows) for t, b in (row.params.logit_bias or {}).items()]
    if biases:
        at, token, bias = torch.tensor(biases, dtype=torch.float64, device=device).unbind(1)
        x[at.long(), token.long()] += bias.float()
    banned = [
        (i, t)
        for i, row in enumerate(rows)
        if row.step < row.params.min_tokens
        for t in {*row.eos_token_ids, *(row.params.stop_token_ids or ())}
        if t < vocab
    ]
    banned += [(i, t) for i, row in enumerate(rows) for t in _bad_tokens(row) if t < vocab]
    if banned:
        at, token = torch.tensor(banned, device=device).unbind(1)
        x[at, token] -= torch.inf  # subtraction, not a mask: NaN and +Inf must stay visible as errors

    penalized = [i for i, row in enumerate(rows) if has_penalty(row.params)]
    if penalized:
        some = [rows[i] for i in penalized]
        y = x[penalized]
        settings = [
            (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in (row.params for row in some)
        ]
        repetition, presence, frequency = torch.tensor(settings, device=device).T[:, :, None]
        outputs = _flat_ids([row.output_token_ids for row in some], vocab).to(device)
        prompts = _flat_ids([row.prompt_token_ids for row in some], vocab).to(device)
        count = torch.zeros_like(y)
        count.view(-1).scatter_add_(0, outputs, torch.ones_like(outputs, dtype=count.dtype))
        used = count > 0
        seen = used.clone()
        seen.view(-1)[prompts] = True
        y = torch.where(seen, torch.where(y > 0, y / repetition, y * repetition), y)
        x[penalized] = y - frequency * count - presence * used
    for i, row in enumerate(rows):
        if (allowed := row.params.allowed_token_ids) is not None:
            forbidden = torch.ones(vocab, dtype=torch.bool)
            forbidden[list(allowed)] = False
            x[i, forbidden.to(device)] -= torch.inf  # subtraction, as above
    return x


def _bad_tokens(row: SamplingRow) -> Iterator[int]:
    """Yield the last token of each forbidden sequence if its other tokens are the end of the output."""
    for ids in row.params.bad_words_token_ids or ():
        *before, last = ids
        start = len(row.output_token_ids) - len(before)
        if start >= 0 and [int(t) for t in row.output_token_ids[start:]] == before:
            yield last


def _flat_ids(lists: Sequence[Sequence[int]], vocab: int) -> Tensor:
    """Return flat indices of each row's tokens in a (num_rows, vocab) tensor, without tokens outside the vocabulary."""
    parts = []
    for i, ids in enumerate(lists):
        tokens = torch.as_tensor(ids, dtype=torch.int64)
        parts.append(tokens[(tokens >= 0) & (tokens < vocab)] + i * vocab)
    return torch.cat(parts)


def _draw(x: Tensor, highest: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Draw tokens for rows that are not greedy.

    Args:
        x: (num_rows, vocab_size) float32 processed logits.
        highest: (num_rows, 1) highest logit of each row.
        rows: sampler inputs of each row.

    Returns:
        (num_rows,) int64 tokens.
    """
    vocab = x.shape[1]
    settings = [
        (
            p.temperature,
            p.min_p,
            p.top_k if 0 < p.top_k < vocab else vocab,
            p.top_p if p.top_p < 1 else torch.inf,  # inf: rounding of the total must not exclude a token
            uniform(row.seed, row.step),
        )
        for row in rows
        for p in (row.params,)
    ]
    columns = torch.tensor(settings, dtype=torch.float64, device=x.device).T[:, :, None]
    temperature, min_p, top_k, top_p, u = columns
    # Probabilities relative to the likeliest token: no overflow at any temperature, and min-p is one comparison.
    weights = ((x.double() - highest) / temperature).exp_()
    if any(row.params.min_p for row in rows):
        weights.masked_fill_(weights < min_p, 0)

    limited = [i for i, row in enumerate(rows) if 0 < row.params.top_k < vocab]
    nucleus = [i for i, row in enumerate(rows) if row.params.top_p < 1 and not 0 < row.params.top_k < vocab]
    for group, width in ((limited, max((rows[i].params.top_k for i in limited), default=0)), (nucleus, vocab)):
        if group:
            weights[group] = _truncate(x[group], weights[group], top_k[group], top_p[group], width)

    # A parallel scan need not be monotonic to the last bit. With the sums of excluded tokens set to 0, and u scaled by
    # the largest remaining sum, the first sum above the target belongs to an allowed token for every u in [0, 1).
    sums = weights.cumsum(-1).masked_fill_(weights == 0, 0)
    return (sums > u * sums.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def _truncate(x: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Set the weights to 0 of tokens that top-k, then top-p exclude.

    Args:
        x: (num_rows, vocab_size) float32 logits, which rank the tokens.
        weights: (num_rows, vocab_size) float64, not negative, increasing with the logits.
        top_k: (num_rows, 1) float64 whole numbers in [1, width].
        top_p: (num_rows, 1) float64; inf: no limit.
        width: number of largest logits to consider.

    Returns:
        Weights, in new memory.
    """
    ranked, order = x.topk(width) if width < x.shape[1] else x.sort(descending=True)
    inside = torch.arange(width, device=x.device) < top_k
    mass = weights.gather(1, order).masked_fill_(~inside, 0)
    before = mass.cumsum(-1)
    total = before[:, -1:].clone()
    before -= mass
    kept = ((before < top_p * total) & inside).sum(-1, keepdim=True).clamp_(min=1)
    # `topk` and `sort` order equal logits arbitrarily. So keep all logits above the lowest kept one, and of those equal
    # to it the first by token id.
    lowest = ranked.gather(1, kept - 1)
    equals = kept - (ranked > lowest).sum(-1, keepdim=True)
    equal = x == lowest
    keep = (x > lowest) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= equals))
    return weights.masked_fill(~keep, 0)


def _score(logits: Tensor, ids: Tensor, k: int) -> Tensor:
    """Return (N, 3 + 2k) float64 for logits (N, vocab_size) and tokens (N,).

    Columns: token, its logprob, its rank, the k likeliest tokens, their k logprobs.
    """
    size = max(1, _MAX_LOGITS // logits.shape[1])
    blocks = []
    for x, token in zip(logits.split(size), ids[:, None].split(size), strict=True):
        logprobs = torch.log_softmax(x, -1, dtype=torch.float32)
        logprob = logprobs.gather(1, token)
        rank = (logprobs > logprob).sum(-1, keepdim=True) + 1
        top, top_ids = logprobs.topk(k)
        blocks.append(torch.cat([part.double() for part in (token, logprob, rank, top_ids, top)], 1))
    return torch.cat(blocks)


def _unpack(row: list[float], k: int) -> TokenLogprobs:
    """Return the k likeliest tokens of a row of `_score`, which may contain more than k."""
    width = (len(row) - 3) // 2
    top_ids = [int(i) for i in row[3 : 3 + k]]
    top = row[3 + width : 3 + width + k]
    ranks: list[int] = []
    for i, logprob in enumerate(top):
        ranks.append(ranks[-1] if i and logprob == top[i - 1] else i + 1)
    return TokenLogprobs(int(row[0]), row[1], int(row[2]), top_ids, top, ranks)
