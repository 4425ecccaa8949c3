import numpy as np
import pytest

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.top_k import top_k, upload
from mpanet_jax.progress import Bar


def brute(query, gallery, k, metric):
    query, gallery = query.astype(np.float64), gallery.astype(np.float64)
    result = []
    for q in query:
        if metric == "euclidean":
            distance = [np.sqrt(np.sum((g - q) ** 2)) for g in gallery]
        else:
            norms = [np.sqrt(np.sum(g * g)) * np.sqrt(np.sum(q * q)) for g in gallery]
            distance = [1 - np.sum(g * q) / n if n else 1.0 for g, n in zip(gallery, norms, strict=True)]
        order = sorted(range(len(gallery)), key=lambda j: distance[j])[:k]
        result.append((order, [distance[j] for j in order]))
    return result


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("number", "k", "block"), [(500, 7, 64), (500, 50, 11), (30, 50, 8), (200, 3, None)])
@pytest.mark.parametrize("kind", ["normal", "duplicates", "near", "large", "zeros"])
def test_equals_brute_force(metric, number, k, block, kind):
    generator = np.random.default_rng(number + k)
    query = generator.standard_normal((6, 12)).astype(np.float32)
    gallery = generator.standard_normal((number, 12)).astype(np.float32)
    if kind == "duplicates":
        gallery = gallery[generator.integers(0, 10, number)]
    if kind == "near":  # closer together than float32 products tell apart
        gallery = (100 + 1e-5 * gallery).astype(np.float32)
    if kind == "large":
        query, gallery = query * np.float32(1e25), gallery * np.float32(1e25)
    if kind == "zeros":
        gallery[generator.random(number) < 0.5] = 0
        query[0] = 0
    expected = brute(query, gallery, k, metric)
    found = [top_k(query, gallery, k, metric, block)]
    if metric == "cosine":
        found.append(top_k(query, gallery, k, metric, block, uploaded=upload(gallery, block)))
    for indices, distances in found:
        for row, (order, exact) in enumerate(expected):
            assert indices[row].tolist() == order
            np.testing.assert_allclose(distances[row], exact, rtol=1e-9, atol=1e-12)


def test_memory_mapped_gallery_and_bad_input(tmp_path):
    generator = np.random.default_rng(0)
    gallery = generator.standard_normal((100, 4)).astype(np.float16)
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    query = generator.standard_normal((3, 4)).astype(np.float32)
    indices, _ = top_k(query, mapped, 5, "cosine", 16)
    assert indices.tolist() == [order for order, _ in brute(query, gallery, 5, "cosine")]
    gallery[70, 1] = np.nan
    with pytest.raises(UserError, match="gallery row 70"):
        top_k(query, gallery, 5, "cosine", 16)
    with pytest.raises(UserError, match="gallery row 70"):
        top_k(query, gallery, 5, "cosine", 16, uploaded=upload(gallery, 16))
    with pytest.raises(ValueError, match="uploaded"):
        top_k(query, gallery, 5, "euclidean", 16, uploaded=[])
    with pytest.raises(ValueError, match="metric"):
        top_k(query, gallery, 5, "manhattan")


def test_a_search_says_how_far_it_is(monkeypatch):
    seen = []
    monkeypatch.setattr(Bar, "advance", lambda self, count=1: seen.append(count))
    generator = np.random.default_rng(0)
    top_k(generator.normal(size=(2, 4)), generator.normal(size=(25, 4)), 3, block=10)
    assert seen == [10, 10, 5]
