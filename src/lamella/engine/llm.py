"""Former path of `lamella.serve.llm`, kept for importers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella._lazy import lazy_attributes

if TYPE_CHECKING:
    from lamella.serve.llm import LLM as LLM

__getattr__, __all__ = lazy_attributes(__name__, {"LLM": "lamella.serve.llm"})
