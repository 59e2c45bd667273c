"""User interfaces of the engine: `LLM` and `AsyncLLM`."""
