"""Exports a trained network as one file for other programs: ONNX or StableHLO (docs/export.md)."""
