"""Tensor parallelism as layers see it: the process group, and each rank's shard of a tensor."""
