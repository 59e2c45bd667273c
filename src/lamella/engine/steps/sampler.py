"""From logits to tokens.

Everything is batched tensor work on the logits' device, with one transfer of results to the host at the end. Each
row's draw depends on its own parameters, seed and step alone, so that a request gets the same tokens from the same
logits whatever batch it is in and however often it was interrupted.
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

_BLOCK = 1 << 24  # logits worked on at a time: bounds the float64 scratch to some hundred MiB
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler must know of the request behind one row of logits.

    Attributes:
        params: its sampling parameters, already validated for the vocabulary.
        seed: its seed; give each of `n` completions its own (consecutive seeds are unrelated).
        step: tokens sampled for it so far; with the seed, it determines the draw.
        prompt_token_ids: its prompt (a list, array or CPU tensor), for the repetition penalty.
        output_token_ids: the tokens sampled so far (likewise), for all penalties.
        eos_token_ids: the model's end-of-sequence tokens, kept out until `min_tokens`.
    """

    params: SamplingParams
    seed: int
    step: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: Collection[int]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, in the model's own distribution (before any processing).

    A rank is 1 + the number of strictly likelier tokens: tied tokens share it.

    Attributes:
        token_id, logprob, rank: those of the sampled (or given) token.
        top_ids, top_logprobs, top_ranks: those of the k likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]
    top_ranks: list[int]

    def as_dict(self, token_text: Callable[[int], str | None]) -> dict[int, Logprob]:
        """By token id, the sampled token first; `token_text` gives a token's text."""
        entries = {self.token_id: Logprob(self.logprob, self.rank, token_text(self.token_id))}
        for token_id, logprob, rank in zip(self.top_ids, self.top_logprobs, self.top_ranks, strict=True):
            if token_id not in entries:
                entries[token_id] = Logprob(logprob, rank, token_text(token_id))
        return entries


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per row, `NO_TOKEN` where none can be chosen, and its log-probabilities where the row's parameters ask
    for them.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Choice:
    """Tokens chosen on the device, and on their way to the host.

    Attributes:
        tokens: (R,) int64 on the device.
    """

    def __init__(
        self,
        tokens: Tensor,
        scores: Tensor | None = None,
        counts: Mapping[int, int] | None = None,
        highest: Tensor | None = None,
    ) -> None:
        """Send what was chosen to the host.

        Args:
            tokens: (R,) int64; `NO_TOKEN` where nothing could be chosen, unless `highest` is given.
            scores: as of `_score`, of the rows in `counts`.
            counts: by row, how many of the likeliest tokens it wants.
            highest: (R,) the highest logit of each row, NaN if it holds one. Without a finite one a row has no token.
        """
        self.tokens, self._counts = tokens, counts or {}
        # Token ids are exact in float64, so one tensor can carry everything to the host.
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
        """The tokens on the host; waits for the device."""
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
    """Choose each row's next token, without waiting for the device where it is a GPU.

    Per row, as in vLLM: logit bias, `min_tokens` mask, penalties; then the argmax if greedy, else temperature, min-p,
    top-k, top-p and a draw. Equal logits rank by ascending token id, so that top-k keeps k tokens exactly.

    Args:
        logits: (R, V), any floating dtype; not modified. A row that holds NaN or +Inf, or, after processing, nothing
            but -Inf, gets `NO_TOKEN`.
        rows: R descriptions.
        draw: does what follows penalties, (R, V) float32 logits to (R,) tokens, in place of plain torch.
    """
    if logits.dtype == torch.float64:
        logits = logits.float()
    highest = None  # what `draw` chooses is checked on the device
    if draw is not None:
        tokens = draw(edit(logits, rows))
    elif all(row.params.greedy and not is_edited(row) for row in rows):
        highest, tokens = logits.max(-1)  # of a NaN, where there is one
    else:
        size = max(1, _BLOCK // logits.shape[1])
        blocks = [_sample(logits[i : i + size], rows[i : i + size]) for i in range(0, len(rows), size)]
        tokens, highest = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return scored(logits, tokens, rows, highest)


def scored(logits: Tensor, tokens: Tensor, rows: Sequence[SamplingRow], highest: Tensor | None = None) -> Choice:
    """The chosen `tokens` (R,) with the log-probabilities that rows ask for; `highest` as of `Choice`."""
    counts = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
    if not counts:
        return Choice(tokens, highest=highest)
    if len(counts) < len(rows):
        wanted = list(counts)
        logits, some = logits[wanted], tokens[wanted]
    else:
        some = tokens
    # What is scored in the place of `NO_TOKEN` is not used.
    return Choice(tokens, _score(logits, some.clamp(min=0), max(counts.values())), counts, highest)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
    """`choose`, and wait for the tokens."""
    return choose(logits, rows).read()


def prompt_logprobs(logits: Tensor, target_ids: Tensor, k: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens and of the k likeliest ones.

    Args:
        logits: (T, V), any floating dtype; row t predicts `target_ids[t]`.
        target_ids: (T,) int64 on the same device.
        k: how many of the likeliest tokens to report, 0 <= k <= V.
    """
    return [_unpack(row, k) for row in _score(logits, target_ids, k).tolist()]


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1), a multiple of 2**-53: output `step` of a splitmix64 stream keyed by the mixed seed."""
    return (_mix(_mix(seed + _GOLDEN) + (step + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def is_edited(row: SamplingRow) -> bool:
    """Whether anything changes the row's logits before the choice."""
    params = row.params
    changed = bool(params.logit_bias) or row.step < params.min_tokens
    return changed or has_penalty(params) or is_restricted(params)


def _sample(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
    """(R, V) logits -> (R,) int64 tokens and the highest logits after editing, on the device."""
    x = edit(logits, rows)
    highest, tokens = x.max(-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if len(drawn) == len(rows):
        tokens = _draw(x, highest[:, None], rows)
    elif drawn:
        tokens[drawn] = _draw(x[drawn], highest[drawn, None], [rows[i] for i in drawn])
    return tokens, highest


def edit(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """(R, V) logits in float32 with biases, penalties and forbidden tokens, as a copy where there are any."""
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
        x[at, token] -= torch.inf  # NaN and +Inf do not become legal by a mask

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
            x[i, forbidden.to(device)] -= torch.inf  # NaN and +Inf do not become legal by a mask
    return x


def _bad_tokens(row: SamplingRow) -> Iterator[int]:
    """The last token of each forbidden sequence whose other tokens are the latest of the output."""
    for ids in row.params.bad_words_token_ids or ():
        *before, last = ids
        start = len(row.output_token_ids) - len(before)
        if start >= 0 and [int(t) for t in row.output_token_ids[start:]] == before:
            yield last


def _flat_ids(lists: Sequence[Sequence[int]], vocab: int) -> Tensor:
    """Indices of (row, token) into a flattened (rows, vocab) tensor; tokens outside the vocabulary are left out."""
    parts = []
    for i, ids in enumerate(lists):
        tokens = torch.as_tensor(ids, dtype=torch.int64)
        parts.append(tokens[(tokens >= 0) & (tokens < vocab)] + i * vocab)
    return torch.cat(parts)


def _draw(x: Tensor, highest: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """(R, V) float32 logits of rows that are not greedy, and the highest of each (R, 1) -> (R,) int64 tokens."""
    vocab = x.shape[1]
    settings = [
        (
            p.temperature,
            p.min_p,
            p.top_k if 0 < p.top_k < vocab else vocab,
            p.top_p if p.top_p < 1 else torch.inf,  # inf: no rounding of the total may cut a token
            uniform(row.seed, row.step),
        )
        for row in rows
        for p in (row.params,)
    ]
    columns = torch.tensor(settings, dtype=torch.float64, device=x.device).T[:, :, None]
    temperature, min_p, top_k, top_p, u = columns
    # Probabilities relative to the likeliest token's: no overflow at any temperature, and min-p is a comparison.
    weights = ((x.double() - highest) / temperature).exp_()
    if any(row.params.min_p for row in rows):
        weights.masked_fill_(weights < min_p, 0)

    limited = [i for i, row in enumerate(rows) if 0 < row.params.top_k < vocab]
    nucleus = [i for i, row in enumerate(rows) if row.params.top_p < 1 and not 0 < row.params.top_k < vocab]
    for group, width in ((limited, max((rows[i].params.top_k for i in limited), default=0)), (nucleus, vocab)):
        if group:
            weights[group] = _truncate(x[group], weights[group], top_k[group], top_p[group], width)

    # A parallel scan need not be monotonic to the last bit: zeroing the sums of impossible tokens, and scaling u by
    # the largest of the others, makes the first sum above the target a possible token's, for every u in [0, 1).
    sums = weights.cumsum(-1).masked_fill_(weights == 0, 0)
    return (sums > u * sums.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def _truncate(x: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Zero the weights that top-k, then top-p leave out.

    Args:
        x: (R, V) float32 logits, by which tokens rank.
        weights: (R, V) float64, not negative, increasing with the logits.
        top_k: (R, 1) float64 whole numbers in [1, width].
        top_p: (R, 1) float64, inf for none.
        width: how many of the largest logits need to be looked at.
    """
    ranked, order = x.topk(width) if width < x.shape[1] else x.sort(descending=True)
    inside = torch.arange(width, device=x.device) < top_k
    mass = weights.gather(1, order).masked_fill_(~inside, 0)
    before = mass.cumsum(-1)
    total = before[:, -1:].clone()
    before -= mass
    kept = ((before < top_p * total) & inside).sum(-1, keepdim=True).clamp_(min=1)
    # The order among equal logits is arbitrary here: take the cut's logit, and as many of its equals as belong in.
    cut = ranked.gather(1, kept - 1)
    equals = kept - (ranked > cut).sum(-1, keepdim=True)
    equal = x == cut
    keep = (x > cut) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= equals))
    return weights.masked_fill(~keep, 0)


def _score(logits: Tensor, ids: Tensor, k: int) -> Tensor:
    """(N, V) logits and (N,) tokens -> (N, 3 + 2k) float64: token, logprob, rank, top-k tokens, their logprobs."""
    size = max(1, _BLOCK // logits.shape[1])
    blocks = []
    for x, token in zip(logits.split(size), ids[:, None].split(size), strict=True):
        logprobs = torch.log_softmax(x, -1, dtype=torch.float32)
        logprob = logprobs.gather(1, token)
        rank = (logprobs > logprob).sum(-1, keepdim=True) + 1
        top, top_ids = logprobs.topk(k)
        blocks.append(torch.cat([part.double() for part in (token, logprob, rank, top_ids, top)], 1))
    return torch.cat(blocks)


def _unpack(row: list[float], k: int) -> TokenLogprobs:
    """One row of `_score`, made for at least k tokens, on the host."""
    most = (len(row) - 3) // 2
    top_ids = [int(i) for i in row[3 : 3 + k]]
    top = row[3 + most : 3 + most + k]
    ranks: list[int] = []
    for i, logprob in enumerate(top):
        ranks.append(ranks[-1] if i and logprob == top[i - 1] else i + 1)
    return TokenLogprobs(int(row[0]), row[1], int(row[2]), top_ids, top, ranks)
