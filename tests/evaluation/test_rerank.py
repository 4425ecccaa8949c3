import tracemalloc

import numpy as np
import pytest

from mpanet_jax.evaluation import rerank
from mpanet_jax.evaluation.rerank import ComputedDistances, KeptDistances, k_reciprocal, squared_distances
from tests.evaluation import brute_force, cases
from tests.evaluation.by_name import evaluate_embeddings


def squared(features):
    return ((features[:, None].astype(np.float64) - features[None]) ** 2).sum(-1).astype(np.float32)


def all_reranked(distances, num_query, **options):
    """In two unequal calls, for queries may be asked for a few at a time."""
    reranked = k_reciprocal(distances, num_query, **options)
    return np.concatenate([reranked(rows) for rows in np.split(np.arange(num_query), [1]) if len(rows)])


@pytest.fixture(params=["whole", "blocks"])
def distances_of(request, monkeypatch):
    """`squared_distances` as small sets have it, and as large ones have it: nothing kept, blocks of a few rows."""
    if request.param == "blocks":
        for name, value in {
            "_KEPT": 0,
            "_CHUNK": 7 * 70,
            "_BLOCK": 2 * 70,
            "_SET_ROWS": 9,
            "_PAIR_VALUES": 11 * 5,
            "_QUERY_ROWS": 4,
        }.items():
            monkeypatch.setattr(rerank, name, value)
    expected = {"whole": KeptDistances, "blocks": ComputedDistances}[request.param]

    def distances(features, metric="euclidean"):
        result = squared_distances(features, metric)
        assert isinstance(result, expected)
        return result

    return distances


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.1), (4, 3, 0.9)])
def test_equals_brute_force(k1, k2, weight, distances_of):
    generator = np.random.default_rng(k1)
    centres = generator.standard_normal((8, 5))
    features = (centres[generator.integers(0, 8, 70)] + 0.5 * generator.standard_normal((70, 5))).astype(np.float32)
    expected = brute_force.rerank(squared(features), 30, k1, k2, weight)
    actual = all_reranked(distances_of(features), 30, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_ties_are_broken_as_in_brute_force(distances_of):
    # Whole numbers: float32 holds all distances exactly. A quarter of the images are copies of others.
    generator = np.random.default_rng(5)
    features = generator.integers(-2, 3, (70, 4)).astype(np.float32)
    features[::4] = features[1]
    expected = brute_force.rerank(squared(features), 25)
    np.testing.assert_allclose(all_reranked(distances_of(features), 25), expected, atol=2e-6)


def test_fewer_images_than_neighbours_and_identical_images(distances_of):
    features = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    expected = brute_force.rerank(squared(features), 4)
    np.testing.assert_allclose(all_reranked(distances_of(features), 4), expected, atol=2e-6)
    assert np.isfinite(all_reranked(distances_of(np.ones((50, 3), np.float32)), 10)).all()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_squared_distances(metric, on_device, monkeypatch):
    features = np.random.default_rng(1).standard_normal((12, 6)).astype(np.float32)
    features[7] = features[2]
    used = features / np.linalg.norm(features, axis=1, keepdims=True) if metric == "cosine" else features
    everything, some = np.arange(12), np.array([9, 2, 7, 0])
    pairs = np.array([[0, 5], [2, 7], [3, 3], [11, 1]]).T
    results = []
    for kept in (2**20, 16, 0):  # all, only the part that is taken, nothing
        monkeypatch.setattr(rerank, "_KEPT", kept)
        distances = squared_distances(features, metric, on_device=on_device)
        part = distances.take(some)
        assert (type(distances), type(part)) == {
            2**20: (KeptDistances, KeptDistances),
            16: (ComputedDistances, KeptDistances),
            0: (ComputedDistances, ComputedDistances),
        }[kept]
        assert distances.take(everything).block(everything).shape == (len(distances), 12)
        results.append(
            (distances.block(everything), distances.block(some), part.block(np.arange(4)), distances.pairs(*pairs))
        )
    expected = squared(used)
    wanted = expected, expected[some], expected[np.ix_(some, some)], expected[pairs[0], pairs[1]]
    for actual in results:
        # Distances matter up to a factor: re-ranking divides by the row's largest.
        factor = expected.max() / actual[0].max()
        for a, w in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(a * factor, w, atol=1e-6 * expected.max())
        assert actual[0][2, 7] == actual[0][7, 2] == 0


def test_memory_grows_with_the_images_and_not_with_their_square(monkeypatch):
    monkeypatch.setattr(rerank, "_KEPT", 0)
    monkeypatch.setattr(rerank, "_CHUNK", 2**16)
    monkeypatch.setattr(rerank, "_BLOCK", 2**16)

    def peak(number):
        generator = np.random.default_rng(0)
        features = generator.standard_normal((number // 8, 8), np.float32).repeat(8, 0)
        features += 0.1 * generator.standard_normal(features.shape, np.float32)
        tracemalloc.start()
        k_reciprocal(squared_distances(features, "euclidean"), 8)(np.arange(8))
        _, largest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return largest

    small, large = peak(1000), peak(4000)
    assert large < 6 * small  # 16 times as many pairs
    assert large < 4000**2 * 4


def test_reranking_is_named_in_the_result_and_improves_clustered_features():
    generator = np.random.default_rng(2)
    pids = np.repeat(np.arange(15), 8)
    centres = generator.standard_normal((15, 16))

    def side(camid):
        images = [(int(pid), camid, f"{pid}/{n}.bmp") for n, pid in enumerate(pids)]
        return cases.embeddings(images, centres[pids] + 1.3 * generator.standard_normal((len(pids), 16)))

    visible, infrared = side(1), side(2)
    plain = evaluate_embeddings(visible, infrared, protocol="regdb")["regdb/visible_to_infrared"]
    reranked = evaluate_embeddings(visible, infrared, protocol="regdb", rerank=True)["regdb/visible_to_infrared"]
    assert (plain["rerank"], reranked["rerank"]) == (False, True)
    assert reranked["mAP"] > plain["mAP"] + 2


def test_reranked_figures_come_from_the_reranked_distances(tmp_path):
    # SYSU-MM01 with trials and camera rules: brute-force re-ranking of each trial's gallery, then brute-force figures.
    generator = np.random.default_rng(3)
    counts = {(camera, pid): 2 for camera in (1, 2, 3, 6) for pid in (1, 2, 3)}
    query, gallery = cases.sysu_images(counts)
    permutation = cases.sysu_permutation(generator, counts, 3)
    path = cases.write_permutation(tmp_path / "rand_perm_cam.mat", permutation)
    query = cases.embeddings(query, generator.standard_normal((len(query), 6)))
    gallery = cases.embeddings(gallery, generator.standard_normal((len(gallery), 6)))
    actual = evaluate_embeddings(query, gallery, protocol="sysu_mm01", permutation=path, rerank=True)

    normalized = [e.features / np.linalg.norm(e.features, axis=1, keepdims=True) for e in (query, gallery)]
    trials = []
    for trial in range(10):
        chosen = {f"cam{c}/{p:04d}/{permutation[c][p][trial][0]:04d}.jpg" for c in (1, 2) for p in (1, 2, 3)}
        rows = [row for row, name in enumerate(gallery.paths) if name in chosen]
        distances = np.array(
            brute_force.rerank(squared(np.concatenate([normalized[0], normalized[1][rows]])), len(query))
        )
        results = []
        for q in range(len(query)):
            room = 2 if query.camids[q] == 3 else query.camids[q]
            order = [rows[j] for j in np.argsort(distances[q], kind="stable") if gallery.camids[rows[j]] != room]
            match = [gallery.pids[g] == query.pids[q] for g in order]
            positions = [i + 1 for i, m in enumerate(match) if m]
            results.append(np.mean([(i + 1) / p for i, p in enumerate(positions)]))
        trials.append(100 * np.mean(results))
    assert actual["sysu/indoor/single"]["mAP"] == pytest.approx(np.mean(trials), abs=1e-6)
