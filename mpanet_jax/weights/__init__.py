"""Weights in and out: files, names, Hugging Face, and conversions."""
