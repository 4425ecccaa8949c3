"""Measures the parts of the project, called by `scripts/benchmark.py`."""
