import numpy as np
import pytest

from mpanet_jax.evaluation.evaluate import evaluate_embeddings
from mpanet_jax.evaluation.rerank import k_reciprocal, squared_distances
from tests.evaluation import brute_force, cases


def squared(features):
    return ((features[:, None].astype(np.float64) - features[None]) ** 2).sum(-1).astype(np.float32)


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.1), (4, 3, 0.9)])
def test_equals_brute_force(k1, k2, weight):
    generator = np.random.default_rng(k1)
    centres = generator.standard_normal((8, 5))
    features = (centres[generator.integers(0, 8, 70)] + 0.5 * generator.standard_normal((70, 5))).astype(np.float32)
    distance = squared(features)
    expected = brute_force.rerank(distance, 30, k1, k2, weight)
    actual = k_reciprocal(distance.copy(), 30, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_fewer_images_than_neighbours_and_identical_images():
    features = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    distance = squared(features)
    np.testing.assert_allclose(k_reciprocal(distance.copy(), 4), brute_force.rerank(distance, 4), atol=2e-6)
    assert np.isfinite(k_reciprocal(np.zeros((50, 50), np.float32), 10)).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_squared_distances(metric):
    features = np.random.default_rng(1).standard_normal((12, 6)).astype(np.float32)
    used = features / np.linalg.norm(features, axis=1, keepdims=True) if metric == "cosine" else features
    expected = squared(used)
    actual = squared_distances(features, metric)
    # Distances matter up to a factor: re-ranking divides by the row's largest.
    np.testing.assert_allclose(actual / actual.max(), expected / expected.max(), atol=1e-6)


def test_reranking_is_named_in_the_result_and_improves_clustered_features():
    generator = np.random.default_rng(2)
    pids = np.repeat(np.arange(15), 8)
    centres = generator.standard_normal((15, 16))

    def side(folder):
        images = [(int(pid), 1, f"{folder}/{pid}/{n}.bmp") for n, pid in enumerate(pids)]
        return cases.embeddings(images, centres[pids] + 1.3 * generator.standard_normal((len(pids), 16)))

    visible, infrared = side("Visible"), side("Thermal")
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
