"""lamella: fast, exact inference for decoder language models whose layers differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella._lazy import lazy_attributes

if TYPE_CHECKING:
    from lamella.engine.async_llm import AsyncLLM as AsyncLLM
    from lamella.engine.llm import LLM as LLM
    from lamella.engine.outputs import CompletionOutput as CompletionOutput
    from lamella.engine.outputs import Logprob as Logprob
    from lamella.engine.outputs import RequestOutput as RequestOutput
    from lamella.engine.sampling_params import SamplingParams as SamplingParams
    from lamella.errors import CheckpointError as CheckpointError
    from lamella.errors import ClosedError as ClosedError
    from lamella.errors import ConfigError as ConfigError
    from lamella.errors import EngineError as EngineError
    from lamella.errors import KernelError as KernelError
    from lamella.errors import LamellaError as LamellaError
    from lamella.errors import ParameterError as ParameterError
    from lamella.errors import UserError as UserError
    from lamella.errors import WorkerError as WorkerError
    from lamella.models.registry import register_architecture as register_architecture

__version__ = "0.1.0"

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "LLM": "lamella.engine.llm",
        "AsyncLLM": "lamella.engine.async_llm",
        "CompletionOutput": "lamella.engine.outputs",
        "Logprob": "lamella.engine.outputs",
        "RequestOutput": "lamella.engine.outputs",
        "SamplingParams": "lamella.engine.sampling_params",
        "CheckpointError": "lamella.errors",
        "ClosedError": "lamella.errors",
        "ConfigError": "lamella.errors",
        "EngineError": "lamella.errors",
        "KernelError": "lamella.errors",
        "LamellaError": "lamella.errors",
        "ParameterError": "lamella.errors",
        "UserError": "lamella.errors",
        "WorkerError": "lamella.errors",
        "register_architecture": "lamella.models.registry",
    },
)
