"""Slot state in vLLM's KV cache blocks."""
