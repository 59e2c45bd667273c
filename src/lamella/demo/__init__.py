"""Bundled demo: a tiny trained LlamaCanon model, and questions whose answers a program can check."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
