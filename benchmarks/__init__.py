"""Benchmarks: `python benchmarks/run.py EXPERIMENT`; results and what they say are in docs/benchmarks.md."""
