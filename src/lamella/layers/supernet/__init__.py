"""Supernets: layers with several mixers, and batches whose requests use different placements."""
