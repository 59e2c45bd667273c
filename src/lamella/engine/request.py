"""A request as the scheduler sees it: tokens, and how many of them the model has computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamella.engine.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """One sequence being generated. Compared by identity."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int = 0
    max_tokens: int = 16  # params.max_tokens, and never beyond the model's length
    eos_token_ids: tuple[int, ...] = ()
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # leading tokens whose state is in the pools
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output together."""
        prompt = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:stop] + self.output_token_ids[max(0, start - prompt) : max(0, stop - prompt)]

    @property
    def needs_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None
