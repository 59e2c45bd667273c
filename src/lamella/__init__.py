"""lamella: fast, exact inference for decoder language models whose layers differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella._lazy import lazy_attributes

if TYPE_CHECKING:
    from lamella.engine.requests.outputs import CompletionOutput as CompletionOutput
    from lamella.engine.requests.outputs import Logprob as Logprob
    from lamella.engine.requests.outputs import RequestOutput as RequestOutput
    from lamella.engine.requests.sampling_params import SamplingParams as SamplingParams
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
    from lamella.serve.async_llm import AsyncLLM as AsyncLLM
    from lamella.serve.llm import LLM as LLM

__version__ = "0.1.0"

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "LLM": "lamella.serve.llm",
        "AsyncLLM": "lamella.serve.async_llm",
        "CompletionOutput": "lamella.engine.requests.outputs",
        "Logprob": "lamella.engine.requests.outputs",
        "RequestOutput": "lamella.engine.requests.outputs",
        "SamplingParams": "lamella.engine.requests.sampling_params",
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
