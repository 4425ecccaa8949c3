import numpy as np
import pytest

from mpanet_jax.evaluation import bootstrap
from mpanet_jax.evaluation.bootstrap import bootstrap_intervals
from mpanet_jax.evaluation.metrics import FIGURES, QueryScores
from tests.evaluation import brute_force, cases
from tests.evaluation.by_name import evaluate_embeddings


def scores(image_rank, average_precision=None, inverse_penalty=None):
    """Of queries whose match is at `image_rank`; 0: they have none. The identity's rank is one less, at least 1."""
    image_rank = np.asarray(image_rank)
    matched = image_rank > 0
    values = [
        np.where(matched, 1 / np.maximum(image_rank, 1), 0) if v is None else np.asarray(v)
        for v in (average_precision, inverse_penalty)
    ]
    return QueryScores(matched.astype(int), np.maximum(image_rank - 1, matched), image_rank, *values)


def by_hand(pids, trials, cmc, resamples, seed):
    """Every resample written out as a list of queries."""
    positions = [
        [(t.identity_rank if cmc == "identity" else t.image_rank)[q] for q in range(len(pids))] for t in trials
    ]
    with_match = [q for q in range(len(pids)) if any(t.matches[q] for t in trials)]
    identities = sorted({int(pids[q]) for q in with_match})
    draws = np.random.default_rng(seed).integers(len(identities), size=(resamples, len(identities)))
    results = []
    for draw in draws:
        queries = [q for chosen in draw for q in with_match if pids[q] == identities[chosen]]
        means = []
        for t, position in zip(trials, positions, strict=True):
            scored = [q for q in queries if t.matches[q]]
            if scored:
                rows = [
                    [*(float(position[q] <= k) for k in (1, 5, 10, 20)), t.average_precision[q], t.inverse_penalty[q]]
                    for q in scored
                ]
                means.append([100 * sum(column) / len(scored) for column in zip(*rows, strict=True)])
        results.append([sum(column) / len(means) for column in zip(*means, strict=True)])
    return np.percentile(results, [2.5, 97.5], axis=0)


@pytest.mark.parametrize("cmc", ["identity", "image"])
def test_equals_resamples_written_out(cmc, monkeypatch):
    generator = np.random.default_rng(0)
    pids = generator.choice([3, 5, 8, 20, 21], 40)
    trials = [
        scores(generator.integers(0, 30, 40) * (pids != 8), generator.random(40), generator.random(40))
        for _ in range(3)
    ]  # identity 8 has no match anywhere; some queries have one in some trials only
    low, high = by_hand(pids, trials, cmc, 200, 7)
    for block in (2**21, 4 * 30):  # all draws at once; 30 at a time
        monkeypatch.setattr(bootstrap, "_BLOCK", block)
        actual = bootstrap_intervals(pids, trials, cmc, resamples=200, seed=7)
        assert tuple(actual) == FIGURES
        np.testing.assert_allclose(np.array(list(actual.values())).T, [low, high], atol=1e-9)


def test_more_queries_of_the_same_identities_do_not_narrow_it():
    generator = np.random.default_rng(1)
    pids, ranks = np.arange(50), generator.integers(1, 4, 50)
    one = bootstrap_intervals(pids, [scores(ranks)], "image")
    many = bootstrap_intervals(np.repeat(pids, 20), [scores(np.repeat(ranks, 20))], "image")
    for name in FIGURES:
        assert many[name] == pytest.approx(one[name], abs=1e-9)
    assert one["rank1"][1] - one["rank1"][0] > 15


def test_it_covers_the_truth_about_as_often_as_it_says():
    # Identities are found with a probability of their own; their queries succeed or fail almost together.
    generator = np.random.default_rng(2)
    covered, repeats = 0, 300
    for _ in range(repeats):
        easy = generator.random(80) < 0.6
        hit = np.where(easy.repeat(6), generator.random(480) < 0.95, generator.random(480) < 0.05)
        low, high = bootstrap_intervals(
            np.arange(80).repeat(6), [scores(np.where(hit, 1, 30))], "image", resamples=400, seed=int(_)
        )["rank1"]
        covered += low <= 100 * (0.6 * 0.95 + 0.4 * 0.05) <= high
    assert 0.90 <= covered / repeats <= 0.98


def test_a_trial_without_a_scored_query_in_the_resample_is_left_out():
    # Identity 1 is scored in the first trial only, identity 2 in the second only.
    trials = [scores([1, 0]), scores([0, 50])]
    low, high = bootstrap_intervals(np.array([1, 2]), trials, "image")["rank1"]
    assert (low, high) == (0, 100)


def test_one_identity_has_no_interval():
    assert bootstrap_intervals(np.array([4, 4, 9]), [scores([1, 2, 0])], "image") == {}
    assert bootstrap_intervals(np.array([4]), [scores([0])], "image") == {}


def test_intervals_of_an_evaluation(tmp_path):
    generator = np.random.default_rng(3)
    counts = {(camera, pid): 2 for camera in range(1, 7) for pid in range(1, 13)}
    query, gallery = (
        cases.embeddings(
            images, generator.standard_normal((len(images), 6)) + [[pid % 5, 0, 0, 0, 0, 0] for pid, *_ in images]
        )
        for images in cases.sysu_images(counts)
    )
    values = evaluate_embeddings(query, gallery, protocol="sysu_mm01_random")["sysu/all/multi"]
    # All ten galleries hold everything there is: one trial by brute force is enough.
    queries, images = brute_force.images(query), brute_force.images(gallery)
    by_query = [
        brute_force.evaluate_query(q, images, brute_force.different_rooms, "cosine", "identity") for q in queries
    ]
    draws = np.random.default_rng(bootstrap.SEED).integers(12, size=(bootstrap.RESAMPLES, 12)) + 1
    for name in FIGURES:
        of_identity = {
            pid: [v[name] for q, v in zip(queries, by_query, strict=True) if q["pid"] == pid] for pid in range(1, 13)
        }
        means = [100 * np.mean([x for pid in draw for x in of_identity[int(pid)]]) for draw in draws]
        assert values["interval"][name] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), abs=1e-7)
        low, high = values["interval"][name]
        assert low <= values[name] <= high
    assert values["interval"]["mAP"][0] < values["mAP"] < values["interval"]["mAP"][1]
