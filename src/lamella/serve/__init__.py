"""The front doors: `LLM`, `AsyncLLM`."""
