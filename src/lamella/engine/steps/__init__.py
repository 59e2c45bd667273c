"""Steps on the device: input tensors, forward, CUDA graphs and sampling."""
