"""Registration with vLLM: architectures, config classes, formats, checks. Imports no model and no layer."""

from __future__ import annotations

from lamella.models.registry import architectures, model_types
from lamella.vllm_plugin import PREFIX, compat

MODULE = "lamella.vllm_plugin.model"
OPERATIONS = ("lamella::stateful", "lamella::stateful_after_norm", "lamella::chosen_mixer")


def served_names() -> dict[str, str]:
    """Return lamella's architectures by the names to register: a prefixed name, and the plain name if vLLM lacks it."""
    names = {f"{PREFIX}{name}": name for name in architectures()}
    return names | {name: name for name in architectures() if compat.module_of(name) in (None, MODULE)}


def register_all() -> None:
    """Register everything; see `lamella.vllm_plugin.register`."""
    from vllm.model_executor.models import ModelRegistry

    from lamella.vllm_plugin.checks import Checks
    from lamella.vllm_plugin.hf_config import register_config
    from lamella.vllm_plugin.loading.formats import register_formats

    for name in served_names():
        if compat.module_of(name) != MODULE:
            ModelRegistry.register_model(name, f"{MODULE}:{name}")
        compat.check_when_configured(name, Checks)
    for model_type in model_types():
        register_config(model_type)
    register_formats()
    for operation in OPERATIONS:
        compat.split_graphs_at(operation)
