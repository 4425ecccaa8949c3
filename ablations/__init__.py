"""The paper's ablation tables, run here: rows, runs and reports, called by `scripts/ablate.py`."""
