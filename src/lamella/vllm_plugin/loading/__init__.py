"""Load checkpoints into vLLM's model: names, formats, quantized tensors."""
