"""One step on the device: its tensors, the forward, CUDA graphs, sampling."""
