import os
import subprocess
import sys

import numpy as np
import pytest

from mpanet_jax.evaluation.metrics import (
    distance_function,
    first_equal_row,
    rank_gallery,
    relative_identities,
    score_rankings,
    summarize,
)


def score(query_pid, ranked_pids, keep=None):
    """Scores of one query whose gallery is ranked already."""
    ranked_pids = np.array([ranked_pids])
    relative, number = relative_identities(np.array([query_pid]), ranked_pids[0])
    identities = relative(np.array([0]), np.arange(ranked_pids.shape[1])[None])
    keep = np.ones(ranked_pids.shape, bool) if keep is None else np.array([keep], bool)
    return score_rankings(identities, keep, number)


def test_figures_worked_out_by_hand():
    # Ranking 5 5 7 | 9 7: the query is 7, at positions 3 and 5.
    scores = score(7, [5, 5, 7, 9, 7])
    assert scores.matches.tolist() == [2]
    assert scores.image_rank.tolist() == [3]
    assert scores.identity_rank.tolist() == [2]  # 5, then 7
    assert scores.average_precision[0] == pytest.approx((1 / 3 + 2 / 5) / 2)
    assert scores.inverse_penalty[0] == pytest.approx(2 / 5)


def test_images_left_out_move_the_others_up():
    # Without the first and the fourth: 5 7 7.
    scores = score(7, [5, 5, 7, 9, 7], keep=[0, 1, 1, 0, 1])
    assert (scores.image_rank[0], scores.identity_rank[0]) == (2, 2)
    assert scores.average_precision[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.inverse_penalty[0] == pytest.approx(2 / 3)


def test_perfect_and_matchless_queries():
    perfect = score(1, [1, 1, 2, 3])
    assert (perfect.image_rank[0], perfect.average_precision[0], perfect.inverse_penalty[0]) == (1, 1, 1)
    for scores in (score(4, [1, 1, 2, 3]), score(1, [1, 2], keep=[0, 1]), score(1, [1, 2], keep=[0, 0])):
        assert scores.matches.tolist() == [0]
        with pytest.raises(ValueError, match="no query has a match"):
            summarize(scores, "image")


def test_summary_by_hand():
    # Three queries of identity 1: match first; match at image 6, third identity; no match.
    gallery = np.array([1, 2, 2, 2, 3, 3, 2])
    order = np.array([[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0, 6], [1, 2, 3, 4, 5, 6, 0]])
    relative, number = relative_identities(np.array([1, 1, 1]), gallery)
    keep = np.ones_like(order, bool)
    keep[2, 6] = False
    scores = score_rankings(relative(np.arange(3), order), keep, number)
    by_identity, by_image = summarize(scores, "identity"), summarize(scores, "image")
    assert by_identity["rank1"] == by_image["rank1"] == 50
    assert (by_identity["rank5"], by_image["rank5"]) == (100, 50)
    assert by_image["rank10"] == 100
    assert by_identity["mAP"] == by_image["mAP"] == pytest.approx(100 * (1 + 1 / 6) / 2)
    assert by_identity["mINP"] == pytest.approx(100 * (1 + 1 / 6) / 2)


def test_ranking_is_stable_and_orders_all_floats():
    generator = np.random.default_rng(0)
    values = np.array([-np.inf, -3e38, -1.5, -1e-45, 0.0, 1e-45, 1e-3, 2.0, 3e38, np.inf], np.float32)
    distance = generator.choice(values, (50, 200))
    expected = np.argsort(distance, axis=1, kind="stable")
    assert np.array_equal(rank_gallery(distance), expected)
    for number in (1, 37, 200, 500):
        assert np.array_equal(rank_gallery(distance, number), expected[:, :number])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_distances_rank_like_the_definition(metric):
    generator = np.random.default_rng(1)
    query, gallery = generator.standard_normal((20, 8)), generator.standard_normal((60, 8)) + 0.5
    if metric == "euclidean":
        expected = np.linalg.norm(query[:, None] - gallery[None], axis=2)
    else:
        expected = -(query @ gallery.T) / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(gallery, axis=1)
    actual = distance_function(gallery.astype(np.float32), metric)(query.astype(np.float32))
    assert np.array_equal(rank_gallery(actual), np.argsort(expected, axis=1))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_neither_overflow_nor_vanish(metric, scale):
    generator = np.random.default_rng(2)
    query, gallery = generator.standard_normal((5, 8), np.float32), generator.standard_normal((30, 8), np.float32)
    plain = rank_gallery(distance_function(gallery, metric)(query))
    scale = np.float32(scale)
    assert np.array_equal(rank_gallery(distance_function(gallery * scale, metric)(query * scale)), plain)


def test_zero_vectors_have_similarity_zero():
    gallery = np.array([[-1, 0], [0, 0], [0, 2], [1, 0]], np.float32)
    order = rank_gallery(distance_function(gallery, "cosine")(np.array([[1, 0], [0, 0], [-0.0, -1]], np.float32)))
    assert order.tolist() == [[3, 1, 2, 0], [0, 1, 2, 3], [0, 1, 3, 2]]


def test_first_equal_row():
    rows = np.zeros((6, 600), np.float32)
    rows[1, 599] = rows[4, 599] = 1  # differs from row 0 in one column that a sample may miss
    rows[2, 0] = rows[5, 0] = 2
    assert first_equal_row(rows).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_products_by_jax_rank_alike(metric):
    generator = np.random.default_rng(3)
    query, gallery = generator.standard_normal((9, 16), np.float32), generator.standard_normal((40, 16), np.float32)
    by_numpy, by_jax = (distance_function(gallery, metric, on_device=on)(query) for on in (False, True))
    np.testing.assert_allclose(by_jax, by_numpy, atol=1e-5)
    assert np.array_equal(rank_gallery(by_jax), rank_gallery(by_numpy))


def test_equal_images_tie_on_cpus_whose_products_depend_on_position():
    # OpenBLAS's kernel for older CPUs rounds the same row differently at different positions of a matrix.
    code = """
import numpy as np
from mpanet_jax.evaluation.metrics import distance_function, rank_gallery
generator = np.random.default_rng(0)
gallery = np.repeat(generator.standard_normal((1, 256), np.float32), 301, 0)
query = generator.standard_normal((50, 256), np.float32)
for metric in ("cosine", "euclidean"):
    assert (rank_gallery(distance_function(gallery, metric)(query)) == np.arange(301)).all()
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Haswell", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
