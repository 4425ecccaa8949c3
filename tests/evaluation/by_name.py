"""The evaluator as most tests call it: by the protocol's name."""

from mpanet_jax.datasets import make_protocol
from mpanet_jax.evaluation import evaluate


def evaluate_embeddings(query, gallery, *, protocol, permutation=None, **options):
    rule = make_protocol(protocol, permutation=permutation)
    return evaluate.evaluate_embeddings(query, gallery, protocol=rule, **options)
