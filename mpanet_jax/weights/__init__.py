"""Weights in and out: files, names, the hub, and whole conversions."""
