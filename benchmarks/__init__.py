"""Benchmarks: one script per hot part; results are stored in `results/`."""
