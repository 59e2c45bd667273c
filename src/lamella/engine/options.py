"""Options of the engine: declared here once, used by `LLM`, `AsyncLLM`, the command line and docs/options.md.

This module does not import torch, so that `lamella --help` is fast.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lamella.config import AttentionConfig, DynamicScaling, LinearScaling, ModelConfig, PlacementLike, YarnScaling
from lamella.config.placement import every_mixer
from lamella.errors import ConfigError
from lamella.validation import INT64, checked_int, finite, shown, whole

if TYPE_CHECKING:
    import torch

    from lamella.layers.decoder import LanguageModel

Bounds: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Option:
    """Declaration of an option, besides its name, type and default.

    Attributes:
        group: heading in lists of options.
        help: description.
        kind: form of the value on the command line, which also selects its check: int, float, str, flag or json. None:
            no check.
        bounds: smallest and largest value of an int.
        choices: allowed texts.
        is_argument: True if the option exists on the command line.
    """

    group: str
    help: str
    kind: str | None
    bounds: Bounds | None = None
    choices: Sequence[str] = ()
    is_argument: bool = True


def _option(default: Any, group: str, kind: str | None, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(group, help, kind, **more)})


# Upper bounds are far beyond what any machine can run. They turn a typing error into an error message before it fills
# the memory or overflows the 32-bit positions of a step.
_TOKENS = (1, 1 << 24)
_MANY = (1, 1 << 40)
MODEL, SCHEDULING, MEMORY, CACHE, RANKS, EXECUTION, OTHER = (
    "Model and files",
    "Requests and steps",
    "Memory for state",
    "Prefix cache",
    "Several devices",
    "Execution",
    "Only in lamella",
)


_MODEL = Option(
    MODEL, "A folder, `demo`, a Hub id, or a constructed model of `lamella.models`.", None, is_argument=False
)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of an engine, with vLLM's names, meanings and defaults where vLLM has them; see docs/options.md."""

    model: str | Path | LanguageModel = field(metadata={"option": _MODEL})
    tokenizer: str | Path | None = _option(
        None, MODEL, "str", "Folder or Hub id whose tokenizer is used in place of the model's."
    )
    revision: str | None = _option(None, MODEL, "str", "Branch, tag or commit of a Hub id.")
    tokenizer_revision: str | None = _option(
        None,
        MODEL,
        "str",
        "Branch, tag or commit of the tokenizer's Hub id; by default `revision` if both are one repository.",
        is_argument=False,
    )
    skip_tokenizer_init: bool = _option(
        False,
        MODEL,
        "flag",
        "Load no tokenizer: prompts are token ids, and outputs have no text.",
        is_argument=False,
    )
    dtype: str | torch.dtype = _option(
        "auto", MODEL, "str", '`"auto"` (the checkpoint\'s), `"float32"`, `"bfloat16"` or `"float16"`.'
    )
    load_format: str = _option("auto", MODEL, "str", '`"auto"`, or `"dummy"` for random weights.')
    hf_overrides: Mapping[str, Any] | None = _option(
        None,
        MODEL,
        "json",
        "Values that replace config.json's; None removes a key. A nested mapping replaces its own keys only, such as "
        '`{"text_config": {"attn_temperature_tuning": False}}`.',
    )
    generation_config: str = _option(
        "auto",
        MODEL,
        "str",
        'Where default sampling parameters come from: `"auto"` (the model\'s generation_config.json), `"vllm"` (none), '
        "or a folder or Hub id with such a file.",
    )
    override_generation_config: Mapping[str, Any] | None = _option(
        None, MODEL, "json", 'Values that replace those of generation_config.json, such as `{"temperature": 0.5}`.'
    )
    limit_mm_per_prompt: Mapping[str, int] | None = _option(
        None,
        MODEL,
        "json",
        'Most images per prompt, such as `{"image": 4}`; 0: do not load the vision encoder; None: no limit.',
    )
    seed: int | None = _option(  # a number after `__post_init__`
        0,
        MODEL,
        "int",
        "Seed of the draws of requests without a seed, and of dummy weights; None: a random seed at each start.",
        bounds=INT64,
    )
    max_model_len: int | None = _option(
        None,
        SCHEDULING,
        "int",
        "Maximum length of prompt and output together, in tokens; None: what the model supports.",
        bounds=_TOKENS,
    )
    max_num_seqs: int = _option(256, SCHEDULING, "int", "Most requests that run at the same time.", bounds=(1, 1 << 16))
    max_num_batched_tokens: int = _option(
        2048, SCHEDULING, "int", "Token budget of a step; longer prompts are computed in chunks.", bounds=_TOKENS
    )
    max_logprobs: int | None = _option(
        None,
        SCHEDULING,
        "int",
        "Most log-probabilities that a request can ask for; None: 1000, -1: no limit.",
        bounds=(-1, 1 << 40),
        is_argument=False,
    )
    gpu_memory_utilization: float | None = _option(
        None,
        MEMORY,
        "float",
        "Fraction of the device's whole memory that the engine can use, weights included (on a CPU, of the host's "
        "memory); None: 85 % of the free memory of a GPU, 25 % of the free memory of a CPU.",
    )
    block_size: int = _option(16, MEMORY, "int", "Tokens in a block of the KV cache.", bounds=(1, 1 << 16))
    num_blocks: int | None = _option(
        None,
        MEMORY,
        "int",
        "Blocks in each pool (vLLM: `num_gpu_blocks_override`); None: as many as fit into the memory.",
        bounds=_MANY,
    )
    enable_prefix_caching: bool = _option(
        True, CACHE, "flag", "Reuse the state of shared beginnings of prompts, and of earlier turns of a conversation."
    )
    snapshot_bytes: int | None = _option(
        None,
        CACHE,
        "int",
        "Bytes for snapshots of slot state, for models that have it; None: a tenth of the memory for state, at most "
        "four snapshots per request of `max_num_seqs`.",
        bounds=(0, 1 << 48),
    )
    snapshot_interval: int | None = _option(
        None,
        CACHE,
        "int",
        "Take an additional snapshot of a prompt's slot state every `snapshot_interval` blocks. Without it there are "
        "snapshots at the ends of prefill chunks, where a prompt branches off from an earlier one, at the positions of "
        "`snapshot_prompts`, and at the latest full block of an output.",
        bounds=_MANY,
    )
    snapshot_prompts: str = _option(
        "auto",
        CACHE,
        "str",
        "When to take snapshots of a prompt's slot state at its last full block and at growing distances before it: "
        '`"always"` (the second request with the same beginning hits), `"never"` (the third one does), or `"busy"` '
        '(only while other requests run). `"auto"` is `"always"` on CPUs, where snapshots cost little, and `"never"` '
        "on GPUs.",
        choices=("auto", "always", "never", "busy"),
    )
    device: str | torch.device = _option(
        "auto", EXECUTION, "str", '`"auto"` (CUDA if there is one), `"cpu"`, `"cuda"`, `"cuda:1"`.'
    )
    enforce_eager: bool = _option(
        False,
        EXECUTION,
        "flag",
        "On a GPU, do not capture decode steps in CUDA graphs: faster start, slower steps. No effect on a CPU.",
    )
    enable_compile: bool = _option(
        False,
        EXECUTION,
        "flag",
        "On a CPU, compile the parts of the layers with torch.compile at the start, one program per kind of part. A "
        "later step that would need another program is an error.",
    )
    round_norms_twice: bool = _option(
        False,
        EXECUTION,
        "flag",
        "For 16-bit models: RMS norms round before the multiplication with the weight, too, as in `transformers`. Only "
        "for comparisons with it: rounding once is more exact, and faster on a GPU.",
    )
    deterministic: bool = _option(
        False, EXECUTION, "flag", "Only False is supported yet; True is an error.", is_argument=False
    )
    tensor_parallel_size: int = _option(
        1,
        RANKS,
        "int",
        "Number of devices of this host (on a CPU: processes) among which the model is sharded.",
        bounds=(1, 1 << 10),
    )
    enable_expert_parallel: bool = _option(
        False, RANKS, "flag", "Each device has some whole experts of a layer, instead of a shard of every expert."
    )
    placement: PlacementLike | None = _option(
        None,
        OTHER,
        "str",
        "For a supernet: the active mixer of each layer, see docs/supernets.md; None: as in the checkpoint.",
    )
    mixed_placements: bool = _option(
        False,
        OTHER,
        "flag",
        "Keep state for all mixers of a supernet, so that each request can have its own placement.",
        is_argument=False,
    )

    def __post_init__(self) -> None:
        if self.seed is None:
            self._set("seed", secrets.randbelow(2**31))
        for each in fields(self):
            declared: Option = each.metadata["option"]
            if getattr(self, each.name) is None and isinstance(each.default, bool | int | str):
                self._set(each.name, each.default)  # vLLM accepts None for the default
            self._check(each.name, declared)
        self._check_sources()
        if self.enable_expert_parallel and self.tensor_parallel_size == 1:
            raise ConfigError("enable_expert_parallel=True: without effect with tensor_parallel_size=1")
        if self.enable_compile and self.enforce_eager:
            raise ConfigError("enable_compile=True: contradicts enforce_eager=True")
        if self.enable_compile and self.mixed_placements:
            raise ConfigError(
                "enable_compile=True: not with mixed_placements=True, which divides batches inside a layer; leave one "
                "out"
            )
        if self.deterministic:
            raise ConfigError(
                "deterministic=True: must be False: this version does not fix the order of sums across batch shapes"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, declared: Option) -> None:
        """Check one option against its declaration."""
        value = getattr(self, name)
        if value is None:
            return
        if declared.bounds is not None:
            self._set(name, checked_int(name, value, *declared.bounds))
        elif declared.kind == "flag" and not isinstance(value, bool):
            raise ConfigError(f"{name}={shown(value)}: must be True or False")
        elif declared.choices and not (isinstance(value, str) and value in declared.choices):
            *first, last = declared.choices
            raise ConfigError(f"{name}={shown(value)}: must be {', '.join(first)} or {last}")

    def _check_sources(self) -> None:
        """Check what declarations cannot express: model and file names, mappings, the fraction of memory."""
        if not isinstance(self.model, str | Path) and not self.is_constructed:
            raise ConfigError(
                f"model={type(self.model).__name__}: must be a folder, `demo`, a Hub id or a model of lamella.models"
            )
        if not (isinstance(self.model, str | Path) or self.is_constructed):
            raise ConfigError(
                f"model={shown(self.model)}: must be a folder, a GGUF file, a Hub id or a constructed model"
            )
        for name in ("tokenizer", "revision", "tokenizer_revision"):
            value = getattr(self, name)
            is_path = name == "tokenizer" and isinstance(value, Path)
            if not (value is None or (isinstance(value, str) and value) or is_path):
                raise ConfigError(f"{name}={value!r}: must be a name, or None")
        for name, file in (("hf_overrides", "config.json"), ("override_generation_config", "generation_config.json")):
            value = getattr(self, name)
            if value is not None and not _has_string_keys(value):
                raise ConfigError(f"{name}={shown(value)}: must be a mapping of {file}'s keys")
        if not (isinstance(self.generation_config, str | Path) and str(self.generation_config)):
            raise ConfigError(f"generation_config={shown(self.generation_config)}: must be auto, vllm or a folder")
        if self.limit_mm_per_prompt is not None and not _is_limit(self.limit_mm_per_prompt):
            raise ConfigError(
                f'limit_mm_per_prompt={shown(self.limit_mm_per_prompt)}: must be {{"image": N}}, N a whole number of '
                "images"
            )
        fraction = self.gpu_memory_utilization
        if fraction is not None:
            number = None if isinstance(fraction, bool) else finite(fraction)
            if number is None or not 0 < number <= 1:
                raise ConfigError(
                    f"gpu_memory_utilization={shown(fraction)}: must be a fraction, more than 0 and at most 1"
                )
            self._set("gpu_memory_utilization", number)
        if self.is_constructed and (self.tensor_parallel_size > 1 or self.load_format != "auto"):
            raise ConfigError("model: a constructed model is used as it is: tensor_parallel_size=1, load_format='auto'")

    @property
    def is_constructed(self) -> bool:
        """True if `model` is a constructed model, not a name."""
        if isinstance(self.model, str | Path):
            return False
        from lamella.layers.decoder import LanguageModel  # here, since it imports torch

        return isinstance(self.model, LanguageModel)

    @property
    def seed_number(self) -> int:
        """Seed in use, never None."""
        assert self.seed is not None
        return self.seed

    @property
    def name(self) -> str:
        """Name of the model in logs and prefix keys."""
        return type(self.model).__name__ if self.is_constructed else str(self.model)

    @property
    def max_images(self) -> int | None:
        """Most images per prompt; None: no limit."""
        return None if self.limit_mm_per_prompt is None else self.limit_mm_per_prompt["image"]

    def resolve_device(self) -> torch.device:
        """Return the device of the engine, with several ranks that of rank 0.

        Raises:
            ConfigError: the machine does not have the device, or it contradicts other options.
        """
        device = self._named_device()
        if self.enable_compile and device.type != "cpu":
            raise ConfigError(
                f"enable_compile=True: only on a CPU; on device={str(device)!r} the engine has fused kernels and graphs"
            )
        return device

    def _named_device(self) -> torch.device:
        import torch

        if self.device == "auto":
            return self._rank_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(self.device, str | torch.device):
            raise ConfigError(f"device={shown(self.device)}: must be auto, cpu, cuda or cuda:N")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"device={self.device!r}: {str(error).splitlines()[0]}") from error
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(
                f"device={str(device)!r}: must be cpu, cuda or cuda:N; other devices have no kernels here"
            )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={self.device!r}: torch sees no CUDA device")
        return self._rank_device(device)

    def _rank_device(self, device: torch.device) -> torch.device:
        import torch

        size = self.tensor_parallel_size
        if size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise ConfigError(f"device={str(device)!r}: must be cuda or cpu with tensor_parallel_size={size}")
        if size > (count := torch.cuda.device_count()):
            raise ConfigError(f"tensor_parallel_size={size}: this host has {count} CUDA device{'s' * (count != 1)}")
        return torch.device("cuda", 0)

    def resolve_length(self, config: ModelConfig) -> int:
        """Return the maximum length of a request, in tokens.

        Raises:
            ConfigError: `max_model_len` is larger than the model supports.
        """
        longest = supported_length(config)
        if self.max_model_len is None:
            return config.max_position_embeddings if longest is None else longest
        if longest is not None and self.max_model_len > longest:
            raise ConfigError(f"max_model_len={self.max_model_len}: the model supports at most {longest}")
        return self.max_model_len


def declared_options() -> dict[str, Option]:
    """Return the declaration of each option, in order."""
    return {each.name: each.metadata["option"] for each in fields(EngineOptions)}


def with_options(first: Sequence[str], rest: str) -> Signature:
    """Return the signature of a constructor that takes the options.

    Args:
        first: options that can be given by position.
        rest: name of the `**` parameter.
    """
    parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)]
    for each in fields(EngineOptions):
        kind = Parameter.POSITIONAL_OR_KEYWORD if each.name in first else Parameter.KEYWORD_ONLY
        default = Parameter.empty if each.name == "model" else each.default
        parameters.append(Parameter(each.name, kind, default=default, annotation=each.type))
    parameters.append(Parameter(rest, Parameter.VAR_KEYWORD, annotation="Any"))
    return Signature(parameters, return_annotation=None)


def _has_string_keys(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_limit(value: object) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"image"}:
        return False
    count = whole(value["image"])
    return count is not None and 0 <= count <= INT64[1]


def supported_length(config: ModelConfig) -> int | None:
    """Return the longest context that the model's RoPE supports, in tokens; None if it adapts to any length."""
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
