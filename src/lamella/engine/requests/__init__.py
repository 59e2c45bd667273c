"""Requests: prompts, validation, sampling parameters, tokens and outputs."""
