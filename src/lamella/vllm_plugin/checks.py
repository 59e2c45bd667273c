"""Checks before vLLM builds an engine: refuse options that would give wrong results, and adapt defaults."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from lamella.config import AttentionConfig, ModelConfig, MoEConfig, StochasticConfig
from lamella.config.placement import every_mixer
from lamella.errors import ConfigError
from lamella.parallel.sharding import Partition
from lamella.vllm_plugin import compat
from lamella.vllm_plugin.hf_config import read_model_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.lamella")  # a child of vLLM's logger, so that vLLM formats the lines

# Speculation methods that need only the tokens, and no other output of the model.
_DRAFTS = ("ngram", "ngram_gpu", "suffix")

_UNSUPPORTED_WITH_EXPERTS = {
    "fbgemm_fp8": "vLLM has no experts in this form; use a file in that of compressed-tensors",
    "bitsandbytes": "its loader fills experts in a way that lamella's experts do not support; use another quantization",
}


class Checks(VerifyAndUpdateConfig):
    """vLLM's hook for checking a config; registered by `compat.check_when_configured`."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the options and adapt defaults in place, with a log line.

        Raises:
            ConfigError: an option is not supported; the message names it.
        """
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
        if on_cpu and parallel.pipeline_parallel_size > 1 and vllm_config.model_config.enforce_eager:
            raise ConfigError(
                "enforce_eager with pipeline_parallel_size > 1: vLLM's CPU runner makes the buffers between stages "
                "only when it compiles; leave enforce_eager out"
            )
        if on_cpu and vllm_config.lora_config is not None:
            raise ConfigError(
                "enable_lora on CPU: vLLM gives requests without an adapter that of others in their batch "
                "(vLLM pull requests 48421, 49656)"
            )
        model = read_model_config(vllm_config.model_config.hf_config, vllm_config.model_config.architecture)
        if any(isinstance(layer.mixer, StochasticConfig) for layer in model.layers):
            _prepare_supernet(vllm_config, model)
        if any(isinstance(layer.feed_forward, MoEConfig) for layer in model.layers):
            _check_experts(vllm_config)
        if not vllm_config.model_config.is_hybrid:
            _fit_blocks(vllm_config, model, on_cpu)
            return
        _check_state(vllm_config)
        if not on_cpu:
            _compile_whole(vllm_config)
        if on_cpu and not cache.user_specified_block_size:
            # One block also holds one request's slot state of a layer, which is smaller than 128 tokens of KV cache.
            cache.block_size, cache.user_specified_block_size = 32, True  # or the platform would choose 128
        if vllm_config.speculative_config is not None:
            _check_speculation(vllm_config, on_cpu)


def _check_experts(vllm_config: VllmConfig) -> None:
    """Refuse options that are not supported when vLLM computes the experts, see `VllmKit.experts`."""
    method, parallel = vllm_config.model_config.quantization, vllm_config.parallel_config
    if method is None and not parallel.enable_expert_parallel:
        return
    reason = _UNSUPPORTED_WITH_EXPERTS.get(method)
    if reason is not None:
        raise ConfigError(f"quantization={method!r}: {reason}")
    if parallel.enable_eplb:
        raise ConfigError("enable_eplb: experts stay on the ranks that loaded them; leave it out")
    for option in ("data_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, option) > 1:
            raise ConfigError(
                f"{option}={getattr(parallel, option)}: quantised experts, and those of enable_expert_parallel, are "
                "spread over tensor-parallel ranks only"
            )
    if vllm_config.lora_config is not None:
        raise ConfigError("enable_lora: not supported with quantised experts or enable_expert_parallel; leave it out")


def _fit_blocks(vllm_config: VllmConfig, model: ModelConfig, on_cpu: bool) -> None:
    """Choose a block size that divides the attention chunks, as vLLM's chunked attention requires.

    Only the default block size on CPUs is changed.

    Raises:
        ConfigError: the given block size, or any block size on CPUs, does not divide the chunks.
    """
    cache, longest = vllm_config.cache_config, vllm_config.model_config.max_model_len
    mixers = [layer.mixer for layer in model.layers]
    chunks = {mixer.chunk for mixer in mixers if isinstance(mixer, AttentionConfig) and mixer.chunk is not None}
    size = math.gcd(*(chunk for chunk in chunks if chunk < longest))  # 0 without chunked layers
    if cache.user_specified_block_size and size % cache.block_size:
        raise ConfigError(f"block_size={cache.block_size}: must divide the chunks of {size} tokens that layers see")
    if on_cpu and not cache.user_specified_block_size and size % 128:
        fitting = math.gcd(size, 128)
        if fitting < 32:
            raise ConfigError(f"layers see chunks of {size} tokens: on CPUs, vLLM's must be multiples of 32; use a GPU")
        cache.block_size, cache.user_specified_block_size = fitting, True


def _prepare_supernet(vllm_config: VllmConfig, model: ModelConfig) -> None:
    """Set the worker extension for placements, and keep the active mixer out of CUDA graphs."""
    from vllm.config import CUDAGraphMode

    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = "lamella.vllm_plugin.placement.PlacementWorker"
    elif not parallel.worker_extension_cls.endswith("PlacementWorker"):
        logger.warning(
            "worker_extension_cls=%r: placements cannot be switched unless it derives from "
            "lamella.vllm_plugin.placement.PlacementWorker", parallel.worker_extension_cls,
        )  # fmt: skip
    if any(len(every_mixer(layer.mixer)) > 1 for layer in model.layers):
        mode = compilation.cudagraph_mode  # None: not chosen yet; vLLM would choose full graphs
        if mode not in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):
            if mode is not None:
                logger.warning(
                    "cudagraph_mode=%s: set to PIECEWISE, since full graphs keep the captured mixer", mode.name
                )
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def _compile_whole(vllm_config: VllmConfig) -> None:
    """Compile the model in one piece, and use CUDA graphs for decode steps only, unless other options are set.

    By default vLLM splits the model at every operation on state, several per layer, and captures a graph of each piece.
    In steps with prompts, launching all these graphs was most of the host's work.
    """
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.config.vllm import OptimizationLevel

    compilation = vllm_config.compilation_config
    is_set = compilation.splitting_ops is not None or compilation.cudagraph_mode is not None
    other_mode = compilation.use_inductor_graph_partition or compilation.mode not in (
        None,
        CompilationMode.VLLM_COMPILE,
    )
    low_level = vllm_config.model_config.enforce_eager or vllm_config.optimization_level < OptimizationLevel.O2
    if is_set or other_mode or low_level:
        return
    compilation.splitting_ops, compilation.cudagraph_mode = [], CUDAGraphMode.FULL_DECODE_ONLY
    logger.info("compiled in one piece, with graphs of decode steps only; cudagraph_mode overrides this")


def _check_state(vllm_config: VllmConfig) -> None:
    """Refuse options of vLLM's state cache that lamella's slot state does not support."""
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    cache = vllm_config.cache_config
    if cache.mamba_cache_dtype not in ("auto", _name(vllm_config.model_config.dtype)):
        raise ConfigError(f"mamba_cache_dtype={cache.mamba_cache_dtype!r}: state has the model's dtype; use 'auto'")
    if cache.mamba_cache_mode == "all":
        raise ConfigError("mamba_cache_mode='all': lamella's layers keep one state per request; use 'align'")
    if is_conv_state_dim_first():
        raise ConfigError("VLLM_SSM_CONV_STATE_LAYOUT=DS: the rows of a state are kept together; use SD")
    if cache.prefix_match_unit is not None and not compat.has_sound_partial_hits():
        raise ConfigError(
            f"prefix_match_unit={cache.prefix_match_unit}: hits within a block give wrong tokens with slot state in "
            "this vLLM (pull request 55112); leave it out"
        )


def _check_speculation(vllm_config: VllmConfig, on_cpu: bool) -> None:
    """Refuse speculation if the drafts, the kind of slot state or the version of vLLM do not support it."""
    method = vllm_config.speculative_config.method
    if method not in _DRAFTS:
        raise ConfigError(f"speculative_config: method {method!r} is not supported; there are {', '.join(_DRAFTS)}")
    from lamella.vllm_plugin.state.layout import StateLayout

    model, dtype = vllm_config.model_config, vllm_config.model_config.dtype
    partition = Partition(0, vllm_config.parallel_config.tensor_parallel_size)
    layout = StateLayout.from_model(read_model_config(model.hf_config, model.architecture), partition, dtype)
    if layout is not None and layout.offsets is not None:
        raise ConfigError(
            "speculative_config: recurrent state cannot be rolled back after a rejected draft; leave it out (models "
            "whose only slot state is convolution windows support it)"
        )
    if not compat.has_sound_speculation():
        raise ConfigError(
            "speculative_config: up to 0.31, vLLM loses the number of accepted tokens in steps without drafts, which "
            "corrupts slot state; use 0.32 or later"
        )
    if on_cpu and vllm_config.cache_config.enable_prefix_caching:
        logger.warning("prefix caching is off: with speculation vLLM copies state by a kernel that has no CPU version")
        vllm_config.cache_config.enable_prefix_caching = False


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
