"""The activations of feed-forwards other than SwiGLU, by the names of config files."""

from __future__ import annotations

from lamella.ops.activation.reference import ACTIVATIONS, activate

__all__ = ["ACTIVATIONS", "activate"]
