"""Former path of `lamella.serve.async_llm`, kept for importers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella._lazy import lazy_attributes

if TYPE_CHECKING:
    from lamella.serve.async_llm import AsyncLLM as AsyncLLM

__getattr__, __all__ = lazy_attributes(__name__, {"AsyncLLM": "lamella.serve.async_llm"})
