"""Activations of feed-forwards other than SwiGLU, by their names in config files."""

from __future__ import annotations

from lamella.ops.activation.reference import ACTIVATIONS, activate

__all__ = ["ACTIVATIONS", "activate"]
