"""Modules built from layer configs. They use tensors, a kit and the current batch; they never import an engine."""
