"""Code that benchmarks share: worker processes, random checkpoints, prompts, token checks, roofline, timing.

The scripts run as `python benchmarks/NAME.py`, so this package is imported as `common`.
"""
