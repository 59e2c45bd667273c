"""GGUF files: metadata, quantized tensors, tokenizer and chat templates. Uses the `gguf` package."""
