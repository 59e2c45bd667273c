"""One step on the device: from the scheduler's shares to sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.engine.request import Request
from lamella.engine.sampler import SamplingRow, TokenLogprobs, prompt_logprobs, sample
from lamella.engine.scheduler import Scheduled
from lamella.layers.context import ForwardBatch, PageView, forward_batch
from lamella.layers.decoder import LanguageModel
from lamella.ops.ragged import RaggedBatch
from lamella.state.manager import StateManager

_LOGITS_ROWS = 256  # rows of the vocabulary's width at a time, where a prompt's logprobs are wanted


@dataclass(frozen=True)
class StepResult:
    """What a step gave one request."""

    request: Request
    token_id: int | None = None  # None while the prompt is not through
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # of the prompt tokens after this share's, in order


class ModelRunner:
    """Runs a model's steps over the state that its requests hold."""

    def __init__(self, model: LanguageModel, state: StateManager, device: torch.device) -> None:
        self.model, self.state, self.device = model, state, device

    @torch.inference_mode()
    def run(self, step: Sequence[Scheduled]) -> list[StepResult]:
        """Compute the shares of a step; the results' order is not the shares'."""
        shares = sorted(step, key=lambda share: share.count != 1)  # decodes first, see RaggedBatch
        tokens = [token for s in shares for token in s.request.token_ids(s.start, s.start + s.count)]
        input_ids = torch.tensor(tokens).to(self.device, non_blocking=True)
        with forward_batch(self._batch(shares)) as batch:
            hidden = self.model(input_ids)
            prompts = self._prompt_logprobs(shares, hidden)
            sampled = self._sample(shares, hidden, batch)
        results = []
        for share in shares:
            token_id, logprobs = sampled.get(share.request, (None, None))
            results.append(StepResult(share.request, token_id, logprobs, prompts.get(share.request, ())))
        return results

    def _batch(self, shares: Sequence[Scheduled]) -> ForwardBatch:
        ragged = RaggedBatch.from_lengths([s.count for s in shares], [s.start + s.count for s in shares], self.device)
        holdings = [self.state.holdings[share.request] for share in shares]
        page_size = self.state.page_size
        longest = self.state.pages_for(max(ragged.context_lens))
        views = {}
        for index, group in enumerate(self.state.groups):
            tables = [h.pages[index] + [0] * (longest - len(h.pages[index])) for h in holdings]
            table = torch.tensor(tables, dtype=torch.int32).to(self.device, non_blocking=True)
            pages = table[ragged.token_request, ragged.positions // page_size]
            views[group] = PageView(table, pages.long() * page_size + ragged.positions % page_size)
        slots = torch.tensor([holding.slot for holding in holdings]).to(self.device, non_blocking=True)
        return ForwardBatch(ragged, views, slots)

    def _sample(
        self, shares: Sequence[Scheduled], hidden: Tensor, batch: ForwardBatch
    ) -> dict[Request, tuple[int, TokenLogprobs | None]]:
        """The next token of each request whose share ends with its last token."""
        indices = [index for index, share in enumerate(shares) if share.samples]
        if not indices:
            return {}
        last = batch.ragged.query_start_loc[1:].long() - 1
        logits = self.model.compute_logits(hidden[last if len(indices) == len(shares) else last[indices]])
        requests = [shares[index].request for index in indices]
        rows = [
            SamplingRow(
                params=request.params,
                seed=request.seed,
                step=len(request.output_token_ids),
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=request.output_token_ids,
                eos_token_ids=request.eos_token_ids,
            )
            for request in requests
        ]
        chosen = sample(logits, rows)
        return dict(zip(requests, zip(chosen.token_ids, chosen.logprobs, strict=True), strict=True))

    def _prompt_logprobs(self, shares: Sequence[Scheduled], hidden: Tensor) -> dict[Request, list[TokenLogprobs]]:
        found: dict[Request, list[TokenLogprobs]] = {}
        start = 0
        for share in shares:
            request, first = share.request, start
            start += share.count
            wanted = request.params.prompt_logprobs
            targets = request.prompt_token_ids[share.start + 1 : share.start + share.count + 1]
            if wanted is None or not targets:
                continue
            ids = torch.tensor(targets).to(self.device)
            rows = hidden[first : first + len(targets)]
            found[request] = [
                entry
                for part, some in zip(rows.split(_LOGITS_ROWS), ids.split(_LOGITS_ROWS), strict=True)
                for entry in prompt_logprobs(self.model.compute_logits(part), some, wanted)
            ]
        return found
