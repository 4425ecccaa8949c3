"""Runs the paper's ablation tables: rows, runs and reports, called by `scripts/ablate.py`."""
