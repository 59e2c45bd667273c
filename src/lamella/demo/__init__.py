"""The bundled demo: a tiny trained LlamaCanon, and questions about it that a program can check."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
