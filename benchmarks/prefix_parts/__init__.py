"""Parts of the benchmark `prefix.py`: models, workloads, engines, checks, costs, timing, tables."""
