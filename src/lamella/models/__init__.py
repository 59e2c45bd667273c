"""Architectures: one file each, with a description and a thin model class for callers that want a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella._lazy import lazy_attributes

if TYPE_CHECKING:
    from lamella.models.apriel2 import Apriel2ForCausalLM as Apriel2ForCausalLM
    from lamella.models.architecture import Architecture as Architecture
    from lamella.models.base import CausalLM as CausalLM
    from lamella.models.llama import LlamaForCausalLM as LlamaForCausalLM
    from lamella.models.llama4 import Llama4ForCausalLM as Llama4ForCausalLM
    from lamella.models.llama4 import Llama4ForConditionalGeneration as Llama4ForConditionalGeneration
    from lamella.models.llama_canon import LlamaCanonForCausalLM as LlamaCanonForCausalLM
    from lamella.models.qwen3 import Qwen3ForCausalLM as Qwen3ForCausalLM
    from lamella.models.registry import MODEL_REGISTRY as MODEL_REGISTRY
    from lamella.models.registry import architectures as architectures
    from lamella.models.registry import register_architecture as register_architecture
    from lamella.models.registry import resolve_architecture as resolve_architecture

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "Apriel2ForCausalLM": "lamella.models.apriel2",
        "Architecture": "lamella.models.architecture",
        "CausalLM": "lamella.models.base",
        "Llama4ForCausalLM": "lamella.models.llama4",
        "Llama4ForConditionalGeneration": "lamella.models.llama4",
        "LlamaCanonForCausalLM": "lamella.models.llama_canon",
        "LlamaForCausalLM": "lamella.models.llama",
        "MODEL_REGISTRY": "lamella.models.registry",
        "Qwen3ForCausalLM": "lamella.models.qwen3",
        "architectures": "lamella.models.registry",
        "register_architecture": "lamella.models.registry",
        "resolve_architecture": "lamella.models.registry",
    },
)
