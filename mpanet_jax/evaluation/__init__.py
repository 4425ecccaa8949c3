"""Protocols, figures and the evaluator: from embeddings to metrics.json."""
