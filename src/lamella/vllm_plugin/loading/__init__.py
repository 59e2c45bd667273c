"""Loading of checkpoints into vLLM's model: names, formats, quantised tensors."""
