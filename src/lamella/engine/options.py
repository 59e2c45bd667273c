"""The engine's settings, checked before anything is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lamella.config import AttentionConfig, DynamicScaling, LinearScaling, ModelConfig, PlacementLike, YarnScaling
from lamella.config.placement import every_mixer
from lamella.errors import ConfigError
from lamella.layers.decoder import LanguageModel
from lamella.validation import INT64, checked_int, shown, whole

# Bounds of whole numbers. The upper ones are far beyond what any machine can run: they keep a slip of the keyboard from
# taking all memory, or from overflowing a step's 32-bit positions.
_LIMITS = {
    "max_model_len": (1, 1 << 24),
    "max_num_seqs": (1, 1 << 16),
    "max_num_batched_tokens": (1, 1 << 24),
    "tensor_parallel_size": (1, 1 << 10),
    "block_size": (1, 1 << 16),
    "num_blocks": (1, 1 << 40),
    "snapshot_interval": (1, 1 << 40),
    "max_logprobs": (-1, 1 << 40),
    "seed": INT64,
}
_OPTIONAL = frozenset({"max_model_len", "num_blocks", "snapshot_interval", "max_logprobs"})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Names, meanings and defaults as in vLLM, whose users need no manual.

    Attributes:
        model: a folder, `demo`, a Hub id, or a constructed model of lamella.models.
        tokenizer: a folder or Hub id whose tokenizer is used in place of the model's.
        revision: branch, tag or commit of a Hub id.
        tokenizer_revision: of the tokenizer's Hub id; None is `revision` where both are one repository.
        skip_tokenizer_init: load no tokenizer: prompts are token ids, and outputs have no text.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
        max_model_len: longest prompt and output together, in tokens; None is what the model supports.
        max_num_seqs: requests that are computed at a time.
        max_num_batched_tokens: tokens computed in a step; longer prompts are computed in chunks.
        enable_prefix_caching: share the state of equal beginnings of prompts, and of finished conversations.
        tensor_parallel_size: devices of this host (on a CPU: processes) that hold a part of the model each.
        enable_expert_parallel: give each of these devices some of a layer's experts whole, in place of a part of each.
        hf_overrides: values in the place of config.json's, those of a nested mapping by themselves, such as
            `{"text_config": {"attn_temperature_tuning": False}}`.
        limit_mm_per_prompt: of a model that reads images, the most that a prompt may have, `{"image": 4}`; 0 leaves the
            part that reads them in the files; None is no limit.
        placement: of a supernet, which mixer is active in each layer, see `lamella.config.read_placement`; None is the
            checkpoint's own.
        mixed_placements: keep state for all mixers, so that requests may have placements of their own.
        deterministic: only the default is possible yet, True is an error.
        enforce_eager: on a GPU, no graphs of the decode steps: quicker to start, slower to run; no effect on a CPU.
        enable_compile: on a CPU, compile the blocks of the layers by torch.compile at the start, one program for each
            kind of block; afterwards a step that would need another one is an error.
        round_norms_twice: of a 16-bit model, let the RMS norms in front of blocks, of queries and keys and at the end
            round before their weight too, as `transformers` does: to compare with it, since once is more exact, and
            faster on a GPU, where these norms then are kernels of their own.
        seed: of the draws of requests without a seed, and of dummy weights; None draws one at each start.
        load_format: "auto", or "dummy" for random weights.
        block_size: tokens in a page.
        num_blocks: pages in each pool; None takes a share of the free memory.
        gpu_memory_utilization: fraction of the device's whole memory that the engine may fill, weights included (on a
            CPU, of the host's memory); None takes a share of what is free.
        max_logprobs: most log-probabilities that a request may ask for; None is 1000, -1 no limit.
        snapshot_bytes: memory for copies of slot state that the prefix cache keeps, where a model has such state; None
            takes a tenth of the share, at most four copies for each request that can run.
        snapshot_interval: a prompt's slot state is copied at every so many pages; None copies it only where its prefill
            pauses, where it branches off from an earlier prompt (in models with paged state too), and, of an answer,
            at its latest page.
        snapshot_prompts: whether it is copied at a prompt's last full page too, for whoever has the very same prompt,
            at the cost of a step more before the first token: "never", "always", or "busy", only beside other
            requests, whose steps the prompt's rest can join.
    """

    model: str | Path | LanguageModel
    tokenizer: str | Path | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enforce_eager: bool = False
    enable_compile: bool = False
    round_norms_twice: bool = False
    seed: int | None = 0  # a number once the options are made
    load_format: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float | None = None
    max_logprobs: int | None = None
    snapshot_bytes: int | None = None
    snapshot_interval: int | None = None
    snapshot_prompts: str = "never"
    hf_overrides: Mapping[str, Any] | None = None
    limit_mm_per_prompt: Mapping[str, int] | None = None
    placement: PlacementLike | None = None
    mixed_placements: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        for option in fields(self):  # None is vLLM's word for the default
            plain = isinstance(option.default, bool | int | str) and option.name != "seed"
            if plain and getattr(self, option.name) is None:
                object.__setattr__(self, option.name, option.default)
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(2**31))
        for field, (low, high) in _LIMITS.items():
            value = getattr(self, field)
            if value is not None or field not in _OPTIONAL:
                object.__setattr__(self, field, checked_int(field, value, low, high))
        if not (isinstance(self.snapshot_prompts, str) and self.snapshot_prompts in ("always", "never", "busy")):
            raise ConfigError(f"snapshot_prompts={shown(self.snapshot_prompts)}: must be always, never or busy")
        if self.snapshot_bytes is not None and (whole(self.snapshot_bytes) is None or self.snapshot_bytes < 0):
            raise ConfigError(f"snapshot_bytes={shown(self.snapshot_bytes)}: must be a whole number of bytes")
        if self.snapshot_bytes is not None:
            object.__setattr__(self, "snapshot_bytes", checked_int("snapshot_bytes", self.snapshot_bytes, 0, 1 << 48))
        if self.hf_overrides is not None and not _has_string_keys(self.hf_overrides):
            raise ConfigError(f"hf_overrides={shown(self.hf_overrides)}: must be a mapping of config.json's keys")
        if self.limit_mm_per_prompt is not None and not _is_limit(self.limit_mm_per_prompt):
            raise ConfigError(
                f'limit_mm_per_prompt={shown(self.limit_mm_per_prompt)}: must be {{"image": N}}, N a whole number of '
                "images"
            )
        self._check_sources()
        for field in (
            "enable_prefix_caching",
            "enable_expert_parallel",
            "enforce_eager",
            "enable_compile",
            "round_norms_twice",
            "deterministic",
            "mixed_placements",
        ):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field}={shown(getattr(self, field))}: must be True or False")
        if self.enable_expert_parallel and self.tensor_parallel_size == 1:
            raise ConfigError("enable_expert_parallel=True: without effect with tensor_parallel_size=1")
        if self.enable_compile and self.enforce_eager:
            raise ConfigError("enable_compile=True: contradicts enforce_eager=True")
        if self.enable_compile and self.mixed_placements:
            raise ConfigError(
                "enable_compile=True: not with mixed_placements=True, where requests enter the middle of a block"
            )
        unsupported = {
            "deterministic": (False, "this version does not fix the order of sums across batch shapes"),
        }
        for field, (only, why) in unsupported.items():
            if getattr(self, field) != only:
                raise ConfigError(f"{field}={getattr(self, field)!r}: must be {only}: {why}")

    def _check_sources(self) -> None:
        """Check where files come from, and what may be asked of memory and requests."""
        if not isinstance(self.model, str | Path | LanguageModel):
            raise ConfigError(
                f"model={type(self.model).__name__}: must be a folder, `demo`, a Hub id or a model of lamella.models"
            )
        for field in ("tokenizer", "revision", "tokenizer_revision"):
            value = getattr(self, field)
            if not (value is None or (isinstance(value, str) and value) or (field == "tokenizer" and value)):
                raise ConfigError(f"{field}={value!r}: must be a name, or None")
        if not isinstance(self.skip_tokenizer_init, bool):
            raise ConfigError(f"skip_tokenizer_init={self.skip_tokenizer_init!r}: must be True or False")
        share = self.gpu_memory_utilization
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
            raise ConfigError(f"gpu_memory_utilization={share!r}: must be a fraction, more than 0 and at most 1")
        if isinstance(self.model, LanguageModel) and (self.tensor_parallel_size > 1 or self.load_format != "auto"):
            raise ConfigError("model: a constructed model is used as it is: tensor_parallel_size=1, load_format='auto'")

    @property
    def seed_number(self) -> int:
        """The seed that is in use."""
        assert self.seed is not None
        return self.seed

    @property
    def name(self) -> str:
        """The model's name in logs and keys."""
        return type(self.model).__name__ if isinstance(self.model, LanguageModel) else str(self.model)

    @property
    def max_images(self) -> int | None:
        """The most images that a prompt may have; None is no limit."""
        return None if self.limit_mm_per_prompt is None else self.limit_mm_per_prompt["image"]

    def resolve_device(self) -> torch.device:
        """The device to run on, rank 0's where there are several."""
        device = self._named_device()
        if self.enable_compile and device.type != "cpu":
            raise ConfigError(
                f"enable_compile=True: only on a CPU; on device={str(device)!r} the engine has fused kernels and graphs"
            )
        return device

    def _named_device(self) -> torch.device:
        if self.device == "auto":
            return self._device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"device={self.device!r}: {str(error).splitlines()[0]}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={self.device!r}: torch sees no CUDA device")
        return self._device(device)

    def _device(self, device: torch.device) -> torch.device:
        size = self.tensor_parallel_size
        if size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise ConfigError(f"device={str(device)!r}: must be cuda or cpu with tensor_parallel_size={size}")
        if size > (count := torch.cuda.device_count()):
            raise ConfigError(f"tensor_parallel_size={size}: this host has {count} CUDA device{'s' * (count != 1)}")
        return torch.device("cuda", 0)

    def resolve_length(self, config: ModelConfig) -> int:
        """The longest request in tokens; more than the model supports is an error."""
        longest = supported_length(config)
        if self.max_model_len is None:
            return config.max_position_embeddings if longest is None else longest
        if longest is not None and self.max_model_len > longest:
            raise ConfigError(f"max_model_len={self.max_model_len}: the model supports at most {longest}")
        return self.max_model_len


def _has_string_keys(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_limit(value: object) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"image"}:
        return False
    count = whole(value["image"])
    return count is not None and 0 <= count <= INT64[1]


def supported_length(config: ModelConfig) -> int | None:
    """The longest context that the model's rotation is made for; None where it adapts to any length."""
    if not config.length_is_known:
        return None
    lengths: list[int] = []
    for mixer in (mixer for layer in config.layers for mixer in every_mixer(layer.mixer)):
        rope = mixer.rope if isinstance(mixer, AttentionConfig) else None
        scaling = rope.scaling if rope else None
        if isinstance(scaling, DynamicScaling):
            return None
        if isinstance(scaling, YarnScaling):
            lengths.append(int(scaling.original_length * scaling.factor))
        elif isinstance(scaling, LinearScaling):
            lengths.append(int(config.max_position_embeddings * scaling.factor))
    return max([config.max_position_embeddings, *lengths])
