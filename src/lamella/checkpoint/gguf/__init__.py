"""GGUF files: metadata, quantized tensors, tokenizer and chat template, read by the `gguf` package."""
