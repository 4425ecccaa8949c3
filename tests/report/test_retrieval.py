"""The rankings behind the page, against the protocols in plain loops and against the project's own table."""

import numpy as np
import pytest

from mpanet_jax.errors import ArgumentError
from mpanet_jax.evaluation.evaluate import evaluate_embeddings
from mpanet_jax.report.retrieval import NOBODY, rank_queries
from tests.evaluation import brute_force
from tests.report.page_cases import CamerasProtocol, people


@pytest.fixture(scope="module")
def sets():
    return people(8, 30, 60, spread=1.5)


def may_meet(query, image):
    return (query["pid"], query["camid"]) != (image["pid"], image["camid"])


@pytest.mark.parametrize("metric, cmc", [("cosine", "identity"), ("euclidean", "image")])
def test_each_query_is_ranked_as_the_protocol_says(sets, metric, cmc):
    query, gallery = sets
    protocol, trial = CamerasProtocol(), 4
    ranking = rank_queries(query, gallery, protocol=protocol, trial=trial, metric=metric, cmc=cmc)
    rows = protocol.comparisons(query, gallery)[0].settings[0].galleries[trial - 1]
    in_trial = brute_force.images(gallery.take(rows))
    scored = 0
    for index, image in enumerate(brute_force.images(query)):
        left = [other for other in in_trial if may_meet(image, other)]
        expected = sorted(left, key=lambda other: brute_force.distance(image["feature"], other["feature"], metric))
        shown = [NOBODY if row == NOBODY else str(gallery.paths[row]) for row in ranking.top[index]]
        assert shown == [other["path"] for other in expected[:10]] + [NOBODY] * (10 - len(expected[:10]))
        distances = [brute_force.distance(image["feature"], other["feature"], metric) for other in expected[:10]]
        np.testing.assert_allclose(ranking.distances[index, : len(distances)], distances, rtol=1e-4, atol=1e-6)
        figures = brute_force.evaluate_query(image, in_trial, may_meet, metric, cmc)
        if figures is None:
            assert ranking.scores.matches[index] == 0 and ranking.first[index] == NOBODY and ranking.rank[index] == 0
            continue
        scored += 1
        np.testing.assert_allclose(ranking.scores.average_precision[index], figures["mAP"], rtol=1e-12)
        assert (ranking.rank[index] == 1) == bool(figures["rank1"])
        first = next(other for other in expected if other["pid"] == image["pid"])
        assert str(gallery.paths[ranking.first[index]]) == first["path"]
        assert ranking.scores.image_rank[index] == expected.index(first) + 1
    assert 0 < scored <= len(query)


@pytest.mark.parametrize("rerank", [False, True])
def test_the_trials_of_a_setting_average_to_its_line_of_the_table(sets, rerank):
    query, gallery = sets
    table = evaluate_embeddings(query, gallery, protocol=CamerasProtocol(), rerank=rerank)["cameras/single"]
    precisions, first = [], []
    for trial in range(1, 11):
        ranking = rank_queries(query, gallery, protocol=CamerasProtocol(), trial=trial, rerank=rerank)
        scored = ranking.scores.matches > 0
        precisions.append(100 * ranking.scores.average_precision[scored].mean())
        first.append(100 * (ranking.rank[scored] == 1).mean())
        # What is shown first is right exactly where the first rank is.
        right = gallery.pids[ranking.top[scored, 0]] == query.pids[scored]
        np.testing.assert_array_equal(right, ranking.rank[scored] == 1)
    np.testing.assert_allclose([np.mean(precisions), np.mean(first)], [table["mAP"], table["rank1"]], rtol=1e-10)
    assert ranking.metrics["mAP"] == table["mAP"]


@pytest.mark.parametrize("option, named", [({"setting": "sysu/all"}, "cameras/single"), ({"trial": 11}, "1 to 10")])
def test_a_setting_or_trial_that_is_not_there_is_refused(sets, option, named):
    with pytest.raises(ArgumentError, match=named):
        rank_queries(*sets, protocol=CamerasProtocol(), **option)
