"""Measurements of the parts, called by `scripts/benchmark.py`."""
