"""vLLM (0.26 and later) as a scorer: log-probabilities of its prefill and of decode steps with forced tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import ConfigError, ParameterError
from lamella.parity.scores import Generation, Scores, Settings
from lamella.parity.sequences import TokenSequence
from lamella.parity.tested_model import ModelUnderTest

_FORCED = "lamella_forced_token_ids"


def open_scorer(tested: ModelUnderTest, settings: Settings) -> VllmScorer:
    """Open a scorer that computes with vLLM.

    Raises:
        ConfigError: the model has dummy weights, which vLLM cannot read.
    """
    if tested.load_format == "dummy":
        raise ConfigError("vllm: vLLM cannot read dummy weights, which are in no file; use load_format='auto'")
    options = dict(settings.options)
    if tested.placement is not None:
        options["hf_overrides"] = {**options.get("hf_overrides", {}), "placement": tested.placement}
    return VllmScorer(
        tested.folder,
        str(settings.dtype).removeprefix("torch."),
        settings.device.type,
        settings.batch_size,
        tested.max_model_len,
        options=options,
    )


class VllmScorer:
    """`Scorer` around vLLM's offline engine.

    vLLM returns log-probabilities as Python numbers, about 170 bytes each. With a large vocabulary, limit `top` or the
    number of tokens.

    Args:
        model: folder or Hub id.
        dtype: vLLM's dtype; "auto" is vLLM's choice, which is a 16-bit dtype for a float32 checkpoint.
        device: "auto", or the device type that the installed vLLM must run on.
        max_num_seqs: as in vLLM.
        max_model_len: as in vLLM.
        seed: as in vLLM.
        options: further arguments of `vllm.LLM`.

    Raises:
        ConfigError: vLLM is not installed, it runs on another device, or the scorer sets one of `options` itself.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        dtype: str = "auto",
        device: str = "auto",
        max_num_seqs: int = 16,
        max_model_len: int | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(f"vLLM cannot be imported ({error}): pip install 'lamella[vllm]'") from error
        if device not in ("auto", current_platform.device_type):
            raise ConfigError(f"device {device!r}: the installed vLLM runs on {current_platform.device_type!r}")
        settings = {
            "model": str(model),
            "dtype": dtype,
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "seed": seed,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,  # a cached prefix would have no predictions
            "max_logprobs": -1,
            "logprobs_mode": "raw_logprobs",  # before tokens are forced
            "logits_processors": [f"{__name__}:ForcedTokens"],
        }
        options = dict(options or {})
        if taken := sorted(settings.keys() & options.keys()):
            raise ConfigError(f"vLLM's {', '.join(taken)} cannot be an option: the scorer sets it")
        self.llm: Any = LLM(**settings, **options)

    def score(self, sequences: Sequence[TokenSequence], top: int | None = None) -> list[Scores]:
        """Score all sequences in one batch, one request each; see `Scorer.score`.

        Raises:
            ParameterError: a sequence is longer than `max_model_len`, or has a token id outside the vocabulary.
            RuntimeError: vLLM chose another token than the forced one.
        """
        outputs = self._run(
            [sequence.prompt for sequence in sequences],
            [{"max_tokens": len(s.continuation), "extra_args": {_FORCED: list(s.continuation)}} for s in sequences],
            top,
            prompt_logprobs=True,
        )
        for sequence, output in zip(sequences, outputs, strict=True):
            if (taken := tuple(output.outputs[0].token_ids)) != sequence.continuation:
                raise RuntimeError(f"vLLM chose the tokens {taken} where {sequence.continuation} were forced")
        return [self._scores([output.prompt_logprobs, output.outputs[0].logprobs]) for output in outputs]

    def generate(self, prompts: Sequence[tuple[int, ...]], count: int, top: int | None = None) -> list[Generation]:
        """Generate `count` greedy tokens after each prompt, ignoring end-of-text tokens.

        Raises:
            ParameterError: prompt and tokens are longer than `max_model_len`, or a token id is outside the vocabulary.
        """
        outputs = [output.outputs[0] for output in self._run(prompts, [{"max_tokens": count}] * len(prompts), top)]
        return [Generation(tuple(output.token_ids), self._scores([output.logprobs])) for output in outputs]

    def close(self) -> None:
        """Shut the engine down and free its memory, so that another engine can start in this process."""
        if self.llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()

    @property
    def _vocab_size(self) -> int:
        return self.llm.model_config.get_vocab_size()

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        requests: Sequence[Mapping[str, Any]],
        top: int | None,
        prompt_logprobs: bool = False,
    ) -> list[Any]:
        """Return vLLM's greedy output for each prompt, with the sampling parameters in `requests`."""
        from vllm import SamplingParams

        limit, vocab_size = self.llm.model_config.max_model_len, self._vocab_size
        for prompt, request in zip(prompts, requests, strict=True):
            if (length := len(prompt) + request["max_tokens"]) > limit:
                raise ParameterError(f"a sequence of {length} tokens is longer than max_model_len, {limit}")
            ids = (*prompt, *request.get("extra_args", {}).get(_FORCED, ()))
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise ParameterError(f"token ids must be in 0..{vocab_size - 1}, got {min(ids)}..{max(ids)}")
        columns = -1 if top is None or top >= vocab_size else top
        common = {
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": columns,
            "prompt_logprobs": columns if prompt_logprobs else None,
            "flat_logprobs": True,
        }
        params = [SamplingParams(**common, **request) for request in requests]
        return self.llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)

    def _scores(self, flat: Sequence[Any]) -> Scores:
        """Convert consecutive `FlatLogprobs`; each position holds the chosen token first, then the likeliest tokens."""
        count = sum(
            start < end for part in flat for start, end in zip(part.start_indices, part.end_indices, strict=True)
        )
        logprobs = torch.cat([torch.tensor(part.logprobs, dtype=torch.float32) for part in flat]).view(count, -1)
        ids = torch.cat([torch.tensor(part.token_ids, dtype=torch.int64) for part in flat]).view(count, -1)
        target, logprobs, ids = logprobs[:, 0].double(), logprobs[:, 1:], ids[:, 1:]
        if ids.shape[1] < self._vocab_size:
            return Scores(target, logprobs, ids)
        return Scores(target, torch.empty_like(logprobs).scatter_(1, ids, logprobs))


class _Forcing:
    """Logits processor that masks all tokens except the one that a request's `extra_args` force at this step.

    It implements both of vLLM's logits processor interfaces. The first model runner reports batch rows through
    `update_state`. The second model runner fills slots through `add_request`, and `apply` gets a context that maps rows
    to slots.
    """

    def __init__(self, config: Any, state: Any, pin_memory: bool = False) -> None:
        self._state = state  # the second runner's request state; the first runner passes the device here
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        self._slots: dict[int, list[int] | None] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        from vllm.v1.sample.logits_processor import process_dict_updates

        def entry(params: Any, _: list[int] | None, taken: list[int]) -> tuple[list[int], list[int]] | None:
            forced = (params.extra_args or {}).get(_FORCED)
            return forced and (forced, taken)  # vLLM appends to `taken`

        process_dict_updates(self._rows, batch_update, entry)

    def add_request(self, slot: int, params: Any) -> bool:
        self._slots[slot] = (params.extra_args or {}).get(_FORCED)
        return self._slots[slot] is not None

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Mask logits (rows, V) in place."""
        if context is None:
            steps = [(row, forced, len(taken)) for row, (forced, taken) in self._rows.items()]
        else:
            lengths = zip(context.idx_mapping_np.tolist(), context.seq_lens_upper_bound_np.tolist(), strict=False)
            steps = [
                (row, self._slots.get(slot) or [], length - int(self._state.prompt_len.np[slot]))
                for row, (slot, length) in enumerate(lengths)
            ]
        for row, forced, step in steps:
            if 0 <= step < len(forced):  # earlier chunks of a prompt have rows too
                logits[row] = -torch.inf
                logits[row, forced[step]] = 0
        return logits


@cache
def _forced_tokens() -> type:
    from vllm.v1.sample.logits_processor import LogitsProcessor

    bases: list[type] = [LogitsProcessor]
    try:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor
    except ImportError:  # versions without this interface
        pass
    else:
        bases.append(SlotLogitsProcessor)
    return type("ForcedTokens", (_Forcing, *bases), {})


def __getattr__(name: str) -> Any:
    """Return the class `ForcedTokens`; created on access because its base classes are vLLM's.

    vLLM imports the class by name in its own process.
    """
    if name == "ForcedTokens":
        return _forced_tokens()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
