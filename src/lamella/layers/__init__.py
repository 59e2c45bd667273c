"""Modules built from configs. They see tensors, a kit and the batch in flight, and never an engine."""
