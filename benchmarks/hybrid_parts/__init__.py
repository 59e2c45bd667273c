"""Parts of the benchmark `hybrids.py`: models, engines, worker processes, tables."""
