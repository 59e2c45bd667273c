"""Tensor parallelism for layers: the process group, and each rank's shard of a tensor."""
