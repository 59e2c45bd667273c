"""Layers with a choice of mixers, and batches of requests with several placements."""
