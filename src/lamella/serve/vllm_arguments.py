"""Arguments of vLLM's `LLM` that are not options of this engine: a table with one rule per argument."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError
from lamella.validation import is_one_of

logger = logging.getLogger("lamella")

_ANY = object()


@dataclass(frozen=True)
class Argument:
    """Rule for an argument of vLLM.

    Attributes:
        values: accepted values, which are logged as having no effect; `_ANY` accepts every value.
        otherwise: alternative that the error for another value names.
        option: name of the equivalent option here, which gets the value.
    """

    values: Any = _ANY
    otherwise: str = ""
    option: str | None = None

    def accepts(self, value: Any) -> bool:
        """Return True if the value is accepted and has no effect."""
        if self.values is _ANY:
            return True
        return is_one_of(value, self.values)


_NO_EFFECT = Argument()
_ONLY_NONE = (None,)
_OFF = (False, None)
_VLLM = "use vLLM with the lamella plugin"

ARGUMENTS: Mapping[str, Argument] = {
    **dict.fromkeys(
        """
        trust_remote_code swap_space disable_log_stats disable_log_requests enable_log_requests use_tqdm_on_load
        max_parallel_loading_workers disable_custom_all_reduce enable_chunked_prefill served_model_name
        preemption_mode num_scheduler_steps multi_step_stream_outputs use_v2_block_manager max_seq_len_to_capture
        max_context_len_to_capture cudagraph_capture_sizes max_cudagraph_capture_size disable_async_output_proc
        guided_decoding_backend structured_outputs_config otlp_traces_endpoint show_hidden_metrics_for_version
        collect_detailed_traces compilation_config optimization_level performance_mode async_scheduling
        kv_cache_metrics kv_cache_metrics_sample cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics
        enable_logging_iteration_details logging_config log_level log_config_file profiler_config attention_config
        attention_backend kernel_config enable_flashinfer_autotune ir_op_priority disable_cascade_attn
        long_prefill_token_threshold max_num_partial_prefills max_long_partial_prefills
        scheduler_reserve_full_isl prefix_caching_hash_algo safetensors_load_strategy
        safetensors_prefetch_num_threads safetensors_prefetch_block_size pt_load_map_location ignore_patterns
        numa_bind numa_bind_nodes numa_bind_cpus distributed_timeout_seconds cpu_distributed_timeout_seconds
        master_addr master_port ray_workers_use_nsight disable_hybrid_kv_cache_manager mamba_block_size
        mm_processor_cache_gb disable_mm_preprocessor_cache mm_processor_cache_type mm_encoder_tp_mode
        skip_mm_profiling interleave_mm_strings media_io_kwargs allowed_local_media_path allowed_media_domains
        enable_shm_tensor_arena aggregate_engine_logging jit_monitor_mode jit_monitor_verbose
        custom_histogram_buckets moe_backend linear_backend mamba_backend gdn_prefill_backend kda_prefill_backend
        kda_decode_backend watermark renderer_num_workers shutdown_timeout fail_on_environ_validation
        enable_nccl_comm_suspend reasoning_parser reasoning_parser_plugin reasoning_config code_revision
        max_loras max_lora_rank max_cpu_loras lora_dtype fully_sharded_loras lora_extra_vocab_size
        """.split(),
        _NO_EFFECT,
    ),
    "num_gpu_blocks_override": Argument(option="num_blocks"),
    "tokenizer_mode": Argument(("auto", "hf", "fast", "slow"), "give a folder with tokenizer.json as tokenizer="),
    "runner": Argument(("auto", "generate"), "only generation is supported"),
    "task": Argument(("auto", "generate"), "only generation is supported"),
    "convert": Argument(("auto", "none"), "only generation is supported"),
    "pooler_config": Argument(_ONLY_NONE, "only generation is supported"),
    "override_pooler_config": Argument(_ONLY_NONE, "only generation is supported"),
    "config_format": Argument(("auto", "hf"), "give a folder with config.json, or lingua's params.json"),
    "hf_config_path": Argument(_ONLY_NONE, "put config.json beside the weights, or use hf_overrides"),
    "model_impl": Argument(("auto", "vllm"), "the architectures are lamella's own; see docs/adding_a_model.md"),
    "download_dir": Argument(_ONLY_NONE, "set HF_HUB_CACHE in the environment"),
    "hf_token": Argument(_OFF, "set HF_TOKEN in the environment, or run `hf auth login`"),
    "quantization": Argument(_ONLY_NONE, "quantized files are recognized by their config.json"),
    "quantization_config": Argument(_ONLY_NONE, "quantized files are recognized by their config.json"),
    "quantization_param_path": Argument(_ONLY_NONE, "quantized files are recognized by their config.json"),
    "kv_cache_dtype": Argument(("auto",), "keys and values have the model's dtype"),
    "mamba_cache_dtype": Argument(("auto",), "slot state has its own dtype"),
    "mamba_ssm_cache_dtype": Argument(("auto", "float32"), "recurrences are kept in float32"),
    "mamba_cache_mode": Argument(("auto", "none"), "snapshot_interval and snapshot_prompts"),
    "calculate_kv_scales": Argument(_OFF, "keys and values have the model's dtype"),
    "kv_cache_memory_bytes": Argument(_ONLY_NONE, "gpu_memory_utilization, or num_blocks"),
    "cpu_offload_gb": Argument((0, 0.0), f"weights are not offloaded: tensor_parallel_size, or {_VLLM}"),
    "cpu_offload_params": Argument((None, set()), f"weights are not offloaded: tensor_parallel_size, or {_VLLM}"),
    "offload_group_size": Argument((0,), f"weights are not offloaded: tensor_parallel_size, or {_VLLM}"),
    "offload_num_in_group": Argument((1,), f"weights are not offloaded: tensor_parallel_size, or {_VLLM}"),
    "offload_prefetch_step": Argument((1,), f"weights are not offloaded: tensor_parallel_size, or {_VLLM}"),
    "offload_params": Argument((None, set()), f"weights are not offloaded: tensor_parallel_size, or {_VLLM}"),
    "pipeline_parallel_size": Argument((1,), f"tensor_parallel_size, or {_VLLM}"),
    "data_parallel_size": Argument((1,), "one engine per replica, or tensor_parallel_size"),
    "prefill_context_parallel_size": Argument((1,), "tensor_parallel_size"),
    "decode_context_parallel_size": Argument((1,), "tensor_parallel_size"),
    "nnodes": Argument((1,), f"the GPUs of one host: tensor_parallel_size, or {_VLLM}"),
    "distributed_executor_backend": Argument((None, "mp", "uni"), f"mp, or {_VLLM} for Ray"),
    "worker_use_ray": Argument(_OFF, f"tensor_parallel_size on one host, or {_VLLM}"),
    "worker_cls": Argument(("auto",), _VLLM),
    "worker_extension_cls": Argument(("",), _VLLM),
    "enable_dbo": Argument(_OFF, _VLLM),
    "enable_eplb": Argument(_OFF, _VLLM),
    "enable_lora": Argument(_OFF, f"merge the adapter into the model, or {_VLLM}"),
    "enable_prompt_adapter": Argument(_OFF, _VLLM),
    "enable_prompt_embeds": Argument(_OFF, "prompts are texts or token ids"),
    "speculative_config": Argument(_ONLY_NONE, _VLLM),
    "speculative_model": Argument(_ONLY_NONE, _VLLM),
    "spec_method": Argument(_ONLY_NONE, _VLLM),
    "spec_model": Argument(_ONLY_NONE, _VLLM),
    "spec_tokens": Argument(_ONLY_NONE, _VLLM),
    "logits_processors": Argument((None, []), "logit_bias, bad_words and allowed_token_ids of SamplingParams"),
    "logits_processor_pattern": Argument(_ONLY_NONE, "logit_bias, bad_words and allowed_token_ids of SamplingParams"),
    "logprobs_mode": Argument(("raw_logprobs",), "log-probabilities are the model's own, before any processing"),
    "scheduling_policy": Argument(("fcfs",), "requests start in the order in which they come"),
    "scheduler_cls": Argument(_ONLY_NONE, "requests start in the order in which they come"),
    "disable_sliding_window": Argument(_OFF, "hf_overrides changes what the config says of windows"),
    "rope_scaling": Argument((None, {}), "hf_overrides={'rope_scaling': {...}}"),
    "rope_theta": Argument(_ONLY_NONE, "hf_overrides={'rope_theta': ...}"),
    "chat_template": Argument(_ONLY_NONE, "give it to LLM.chat(..., chat_template=...)"),
    "mm_processor_kwargs": Argument((None, {}), "images are tiled as the checkpoint's files say"),
    "enable_sleep_mode": Argument(_OFF, "end the engine, and make a new one"),
    "enable_return_routed_experts": Argument(_OFF, _VLLM),
    "return_sampling_mask": Argument(_OFF, _VLLM),
    "kv_transfer_config": Argument(_ONLY_NONE, _VLLM),
    "kv_events_config": Argument(_ONLY_NONE, _VLLM),
    "ec_transfer_config": Argument(_ONLY_NONE, _VLLM),
    "stream_interval": Argument((1,), "outputs come after each token"),
    "max_num_scheduled_tokens": Argument(_ONLY_NONE, "max_num_batched_tokens"),
    "model_loader_extra_config": Argument((None, {}), "load_format"),
    "additional_config": Argument((None, {}), _VLLM),
    "device_ids": Argument(_ONLY_NONE, "device, or CUDA_VISIBLE_DEVICES"),
}


def engine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert keyword arguments with vLLM's names to options of the engine.

    Arguments without effect here are accepted, and listed in one log line.

    Args:
        given: keyword arguments of `LLM`.

    Returns:
        Values of `EngineOptions` fields by name.

    Raises:
        ConfigError: an argument would change results and is not supported. The message names an alternative.
        TypeError: the argument does not exist.
    """
    own = {field.name for field in fields(EngineOptions)}
    options = {name: value for name, value in given.items() if name in own}
    ignored: dict[str, Any] = {}
    for name, value in given.items():
        if name in own:
            continue
        argument = ARGUMENTS.get(name)
        if argument is None:
            raise TypeError(f"LLM: unexpected keyword argument {name!r}")
        if argument.option is not None:
            stated = options.get(argument.option)
            if value is not None and stated not in (None, value):
                raise ConfigError(f"{name}={value!r}: contradicts {argument.option}={stated!r}")
            options[argument.option] = value if stated is None else stated
        elif argument.accepts(value):
            ignored[name] = value
        else:
            raise ConfigError(f"{name}={value!r}: not supported: {argument.otherwise}")
    if ignored:
        listed = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
        logger.info("arguments of vLLM without effect here: %s", listed)
    return options
