import numpy as np
import pytest

from benchmarks.evaluation import benchmark_rerank, random_embeddings
from benchmarks.evaluation import test_set_counts as counts_of_test_set
from benchmarks.search import benchmark_search
from tests.evaluation import cases
from tests.evaluation.by_name import evaluate_embeddings


def test_built_in_counts_are_sysu_mm01s():
    query, gallery = random_embeddings(counts_of_test_set(), 2)
    assert (len(query), len(gallery)) == (3803, 6775)
    assert len(np.unique(query.pids)) == 96
    single = {(p, c) for p, c in zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True)}
    assert len(single) == 301
    assert sum(c in (1, 2) for _, c in single) == 112


def test_counts_of_a_permutation_file(tmp_path):
    counts = {(1, 1): 3, (2, 2): 11, (3, 1): 2, (6, 2): 4}
    path = cases.write_permutation(
        tmp_path / "rand_perm_cam.mat", cases.sysu_permutation(np.random.default_rng(0), counts, 2)
    )
    found = counts_of_test_set(path, [1, 2])
    assert {key: number for key, number in found.items() if number} == counts
    query, gallery = random_embeddings(found, 4, noise=0.01)
    metrics = evaluate_embeddings(query, gallery, protocol="sysu_mm01", permutation=path)
    assert metrics["sysu/all/single"]["rank1"] == 100


@pytest.mark.parametrize("on_device", [False, True])
def test_search_benchmark_leaves_nothing_behind(tmp_path, on_device):
    result = benchmark_search(tmp_path, num_gallery=300, num_query=3, dimension=64, k=5, on_device=on_device)
    assert result["num_gallery"] == 300 and result["source_is_nearest"] == 1
    assert ("upload_seconds" in result) is on_device
    assert not list(tmp_path.iterdir())


def test_rerank_benchmark_times_distances_apart():
    result = benchmark_rerank(40, 30, 8, repeats=2)
    assert (result["num_query"], result["num_gallery"], result["dimension"]) == (40, 30, 8)
    assert result["seconds"] > 0 and result["distance_seconds"] > 0
