"""The evaluator against brute force: see brute_force.py."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mpanet_jax.datasets.sysu_mm01 import load_permutation
from mpanet_jax.embeddings import Embeddings, load_embeddings, save_embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import FIGURES
from tests.evaluation import brute_force, cases
from tests.evaluation.by_name import evaluate_embeddings

# On no clock: a busy machine is no failure.
EXAMPLES = settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
OPTIONS = {
    "metric": st.sampled_from(["cosine", "euclidean"]),
    "cmc": st.sampled_from(["identity", "image"]),
    "seed": st.integers(0, 2**32 - 1),
}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        for figure in FIGURES:
            assert actual[name][figure] == pytest.approx(expected[name][figure], abs=1e-9), (name, figure)
            assert actual[name]["std"][figure] == pytest.approx(expected[name]["std"][figure], abs=1e-7)


def sysu_case(counts, num_pids, metric, seed, folder, random_features=False):
    generator = np.random.default_rng(seed)
    query, gallery = cases.sysu_images(counts)

    def features(number):
        return (
            generator.standard_normal((number, 8))
            if random_features
            else cases.exact_features(generator, number, metric)
        )

    permutation = cases.sysu_permutation(generator, counts, num_pids)
    path = cases.write_permutation(Path(folder) / "rand_perm_cam.mat", permutation)
    return (
        cases.embeddings(query, features(len(query))),
        cases.embeddings(gallery, features(len(gallery))),
        permutation,
        path,
    )


def has_match(counts, cameras):
    """Whether any query has a match in these gallery cameras; camera 3 has none in camera 2."""
    return any(
        counts.get((6, pid)) or (counts.get((3, pid)) and camera != 2)
        for (camera, pid), number in counts.items()
        if number and camera in cameras
    )


# Up to four identities, each seen by any of the cameras (or none) in up to 13 images.
COUNTS = st.dictionaries(
    st.tuples(st.integers(1, 6), st.integers(1, 4)), st.sampled_from([0, 1, 1, 2, 3, 13]), min_size=2, max_size=16
)


@EXAMPLES
@given(counts=COUNTS, **OPTIONS)
def test_sysu_equals_brute_force(counts, metric, cmc, seed):
    assume(has_match(counts, {1, 2}))
    with tempfile.TemporaryDirectory() as folder:
        query, gallery, permutation, path = sysu_case(counts, 5, metric, seed, folder)
        actual = evaluate_embeddings(query, gallery, protocol="sysu_mm01", permutation=path, metric=metric, cmc=cmc)
    expected = brute_force.sysu(brute_force.images(query), brute_force.images(gallery), permutation, metric, cmc)
    assert_same(actual, expected)


@EXAMPLES
@given(counts=COUNTS, **OPTIONS)
def test_sysu_random_equals_brute_force(counts, metric, cmc, seed):
    assume(has_match(counts, {1, 2}))
    with tempfile.TemporaryDirectory() as folder:
        query, gallery, *_ = sysu_case(counts, 5, metric, seed, folder)
    actual = evaluate_embeddings(query, gallery, protocol="sysu_mm01_random", metric=metric, cmc=cmc)
    assert_same(actual, brute_force.sysu(brute_force.images(query), brute_force.images(gallery), None, metric, cmc))


PAIRS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4, 9])), min_size=1, max_size=25)


def modality_case(pairs, modality, metric, generator):
    images = [(pid, camid, f"{n:04d}.jpg") for n, (pid, camid) in enumerate(pairs)]
    stored = None if modality is None else np.full(len(images), modality)
    return replace(cases.embeddings(images, cases.exact_features(generator, len(images), metric)), modality=stored)


@EXAMPLES
@given(visible=PAIRS, infrared=PAIRS, **OPTIONS)
def test_llcm_equals_brute_force(visible, infrared, metric, cmc, seed):
    assume(any(v[0] == i[0] and v[1] != i[1] for v in visible for i in infrared))
    generator = np.random.default_rng(seed)
    visible = modality_case(visible, 0, metric, generator)
    infrared = modality_case(infrared, 1, metric, generator)
    expected = brute_force.llcm(brute_force.images(visible), brute_force.images(infrared), metric, cmc)
    assert_same(evaluate_embeddings(visible, infrared, protocol="llcm", metric=metric, cmc=cmc), expected)
    # The modality says which is which.
    assert_same(evaluate_embeddings(infrared, visible, protocol="llcm", metric=metric, cmc=cmc), expected)


@EXAMPLES
@given(visible=PAIRS, infrared=PAIRS, **OPTIONS)
def test_regdb_equals_brute_force(visible, infrared, metric, cmc, seed):
    assume({v[0] for v in visible} & {i[0] for i in infrared})
    generator = np.random.default_rng(seed)
    visible = modality_case([(p, 1) for p, _ in visible], 0, metric, generator)
    infrared = modality_case([(p, 2) for p, _ in infrared], 1, metric, generator)
    expected = brute_force.regdb(brute_force.images(visible), brute_force.images(infrared), metric, cmc)
    assert_same(evaluate_embeddings(visible, infrared, protocol="regdb", metric=metric, cmc=cmc), expected)


UNEVEN = {(c, p): (p * 3 + c * 5) % 14 for c in range(1, 7) for p in range(1, 9) if (c + p) % 5}


@pytest.fixture
def uneven(tmp_path):
    return sysu_case(UNEVEN, 9, "cosine", 3, tmp_path, random_features=True)


def test_sysu_defaults_equal_brute_force_on_real_valued_features(uneven):
    query, gallery, permutation, path = uneven
    actual = evaluate_embeddings(query, gallery, protocol="sysu_mm01", permutation=path)
    assert_same(actual, brute_force.sysu(brute_force.images(query), brute_force.images(gallery), permutation))
    values = actual["sysu/all/single"]
    assert (values["protocol"], values["metric"], values["cmc"]) == ("sysu_mm01", "cosine", "identity")
    assert (values["rerank"], values["trials"], values["num_query"]) == (False, 10, len(query))
    assert values["num_gallery"] == sum(number > 0 for (c, _), number in UNEVEN.items() if c in (1, 2, 4, 5))


def take(embeddings, rows):
    return embeddings.take(rows)


@pytest.mark.parametrize("protocol", ["sysu_mm01", "sysu_mm01_random"])
def test_permuting_queries_or_gallery_changes_nothing(uneven, protocol):
    query, gallery, _, path = uneven
    options = {"protocol": protocol, "permutation": path if protocol == "sysu_mm01" else None}
    expected = evaluate_embeddings(query, gallery, **options)
    generator = np.random.default_rng(5)
    for shuffled in (
        (take(query, generator.permutation(len(query))), gallery),
        (query, take(gallery, generator.permutation(len(gallery)))),
    ):
        assert_same(evaluate_embeddings(*shuffled, **options), expected)


def test_scaling_features_changes_nothing_under_cosine_and_something_under_euclidean(uneven):
    query, gallery, _, path = uneven
    generator = np.random.default_rng(6)

    def scaled(e):
        factors = np.float32(2.0) ** generator.integers(-20, 20, (len(e), 1))
        return Embeddings(e.features * factors.astype(np.float32), e.pids, e.camids, e.paths)

    stretched = scaled(query), scaled(gallery)
    for metric, same in (("cosine", True), ("euclidean", False)):
        options = {"protocol": "sysu_mm01", "permutation": path, "metric": metric}
        expected = evaluate_embeddings(query, gallery, **options)["sysu/all/multi"]["mAP"]
        actual = evaluate_embeddings(*stretched, **options)["sysu/all/multi"]["mAP"]
        assert (actual == pytest.approx(expected, abs=1e-9)) == same


@pytest.mark.parametrize("on_device", [False, True])
def test_many_blocks_give_what_one_gives(uneven, monkeypatch, on_device):
    query, gallery, _, path = uneven
    assert len(query) % 7  # so that the last chunk begins within the one before
    options = {"protocol": "sysu_mm01", "permutation": path, "on_device": on_device}
    expected = evaluate_embeddings(query, gallery, **options)
    for chunk in ("_CHUNK", "_CHUNK_ON_DEVICE"):
        monkeypatch.setattr(f"mpanet_jax.evaluation.evaluate.{chunk}", 7 * len(gallery))
    monkeypatch.setattr("mpanet_jax.evaluation.evaluate._BLOCK", 2 * len(gallery))
    assert_same(evaluate_embeddings(query, gallery, **options), expected)


def test_camera_three_never_meets_camera_two(tmp_path):
    # Identity 1's only gallery images are camera 2's; its camera 3 query has no match, its camera 6 query has.
    counts = {(2, 1): 1, (1, 2): 1, (3, 1): 1, (6, 1): 1}
    query, gallery, _, path = sysu_case(counts, 2, "cosine", 0, tmp_path, random_features=True)
    metrics = evaluate_embeddings(query, gallery, protocol="sysu_mm01", permutation=path)
    assert metrics["sysu/all/single"]["num_query"] == 2
    assert metrics["sysu/all/single"]["num_query_without_match"] == 1


def test_a_setting_without_gallery_is_refused(tmp_path):
    query, gallery, _, path = sysu_case({(4, 1): 2, (6, 1): 2}, 1, "cosine", 0, tmp_path, random_features=True)
    refused("sysu/indoor/single: no query", query, gallery, protocol="sysu_mm01", permutation=path)


# ---- what is refused ----


def refused(match, *arguments, **options):
    with pytest.raises(UserError, match=match):
        evaluate_embeddings(*arguments, **options)


def test_a_gallery_that_does_not_fit_the_permutation_is_refused(uneven, tmp_path):
    query, gallery, _, path = uneven
    options = {"protocol": "sysu_mm01", "permutation": path}
    refused(r"identity \d+, camera \d", query, take(gallery, np.arange(1, len(gallery))), **options)
    refused(r"identity \d+, camera \d", query, take(gallery, np.r_[0, np.arange(len(gallery))]), **options)
    one_pid = gallery.pids == gallery.pids[0]
    refused("0 images of identity", query, take(gallery, one_pid), **options)


def test_sysu_cameras_must_be_those_of_the_protocol(uneven):
    query, gallery, _, path = uneven
    options = {"protocol": "sysu_mm01", "permutation": path}
    f, p, c, names = gallery.features, gallery.pids, gallery.camids, gallery.paths
    refused("of camera 0", query, Embeddings(f, p, c - 1, names), **options)
    refused("infrared cameras 3 and 6", gallery, query, **options)
    modality = np.where(c == 1, 1, 0)
    refused("infrared, but camera 1 is visible", query, Embeddings(f, p, c, names, modality), **options)


def test_paths_matter_by_their_order_only(uneven):
    query, gallery, _, path = uneven
    options = {"protocol": "sysu_mm01", "permutation": path}
    expected = evaluate_embeddings(query, gallery, **options)
    f, p, c = gallery.features, gallery.pids, gallery.camids
    neutral = np.array([f"{rank:05d}.png" for rank in np.argsort(np.argsort(gallery.paths))])
    assert_same(evaluate_embeddings(query, Embeddings(f, p, c, neutral), **options), expected)


def test_bad_combinations_are_refused(uneven):
    query, gallery, _, path = uneven
    refused("permutation missing", query, gallery, protocol="sysu_mm01")
    refused("permutation = ", query, gallery, protocol="llcm", permutation=path)
    refused("protocol = 'market1501'", query, gallery, protocol="market1501")
    refused("metric = ", query, gallery, protocol="sysu_mm01_random", metric="manhattan")
    refused("cmc = ", query, gallery, protocol="sysu_mm01_random", cmc="cuhk03")
    narrow = Embeddings(query.features[:, :3], query.pids, query.camids, query.paths)
    refused("3-dimensional", narrow, gallery, protocol="sysu_mm01_random")


def test_two_sets_of_one_modality_are_refused():
    generator = np.random.default_rng(0)
    visible = modality_case([(1, 1), (2, 1)], 0, "cosine", generator)
    refused("both visible", visible, visible, protocol="regdb")
    both = modality_case([(1, 1), (2, 2)], None, "cosine", generator)
    refused("visible and infrared", visible, both, protocol="regdb")
    strangers = modality_case([(3, 2)], 1, "cosine", generator)
    refused("no query", visible, strangers, protocol="regdb")
    refused(
        r"modality\[1\] .* is visible, but camera 2 is infrared",
        *[modality_case([(1, 1), (2, 2)], 0, "cosine", generator)] * 2,
        protocol="regdb",
    )


def test_modality_decides_whatever_the_paths_and_the_order_are():
    generator = np.random.default_rng(0)
    visible = modality_case([(1, 4), (2, 4)], 0, "euclidean", generator)
    infrared = modality_case([(1, 5), (2, 5), (2, 5)], 1, "euclidean", generator)
    for protocol in ("own", "llcm"):
        expected = evaluate_embeddings(visible, infrared, protocol=protocol, trial=4)
        assert expected[f"{protocol}/visible_to_infrared"]["num_query"] == 2
        assert expected[f"{protocol}/visible_to_infrared"]["trial"] == 4
        assert_same(evaluate_embeddings(infrared, visible, protocol=protocol), expected)


def test_where_nothing_tells_the_modality_the_protocols_cameras_do_or_it_is_asked_for():
    generator = np.random.default_rng(0)
    visible = modality_case([(1, 1), (2, 1)], None, "euclidean", generator)
    infrared = modality_case([(1, 2), (2, 2), (2, 2)], None, "euclidean", generator)
    expected = evaluate_embeddings(visible, infrared, protocol="regdb")  # camera 2 is thermal
    assert expected["regdb/visible_to_infrared"]["num_gallery"] == 3
    assert_same(evaluate_embeddings(infrared, visible, protocol="regdb"), expected)
    for protocol in ("llcm", "own"):
        refused(r"store an array modality int\[2\]", visible, infrared, protocol=protocol)


# ---- files ----


def test_embeddings_survive_a_round_trip(uneven, tmp_path):
    query = uneven[0]
    save_embeddings(tmp_path / "new" / "query.npz", query)
    loaded = load_embeddings(tmp_path / "new" / "query.npz")
    for name in ("features", "pids", "camids", "paths"):
        assert np.array_equal(getattr(loaded, name), getattr(query, name))
    assert loaded.modality.tolist() == [-1] * len(query)
    assert loaded.source == str(tmp_path / "new" / "query.npz")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["query.npz"]


def good_arrays():
    return {
        "features": np.ones((3, 2), np.float32),
        "pids": np.arange(3),
        "camids": np.ones(3, int),
        "paths": np.array(["a", "b", "c"]),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", np.array([[1, 2], [3, np.nan], [5, 6]]), r"features\[1\] \(b\)"),
        ("features", np.array([[1, 2], [3, 4], [-np.inf, 6]]), r"features\[2\] \(c\)"),
        ("features", np.full((3, 2), 1e300), r"features\[0\]"),
        ("features", np.ones(3), "features must be"),
        ("features", np.ones((3, 0)), "empty"),
        ("features", np.array([["a", "b"]] * 3), "features must be"),
        ("pids", np.arange(2), r"pids must be int\[3\]"),
        ("pids", np.ones(3), r"pids must be int\[3\]"),
        ("camids", np.ones((3, 1), int), r"camids must be int\[3\]"),
        ("paths", np.arange(3), r"paths must be str\[3\]"),
        ("paths", np.array(["a", "b", None], object), "paths holds Python objects"),
        ("pids", None, "no array named pids"),
        ("modality", np.array([0, 1, 2]), r"modality\[2\] \(c\) is 2; expected 0 \(visible\), 1"),
        ("modality", np.array([0, 1]), r"modality must be int\[3\]"),
        ("pid_names", np.arange(3), r"pid_names must be str\[3\]"),
    ],
)
def test_bad_embeddings_name_file_and_array(tmp_path, name, value, message):
    arrays = good_arrays()
    arrays[name] = value
    if value is None:
        del arrays[name]
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        load_embeddings(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_embeddings_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_embeddings(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="not a readable"):
        load_embeddings(tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(UserError, match="not a readable"):
        load_embeddings(tmp_path / "array.npy")


def test_half_precision_double_precision_and_byte_paths_are_read(tmp_path):
    for dtype in (np.float16, np.float64, np.int32):
        np.savez(
            tmp_path / "e.npz", **{**good_arrays(), "features": np.ones((3, 2), dtype), "paths": np.array([b"a"] * 3)}
        )
        loaded = load_embeddings(tmp_path / "e.npz")
        assert loaded.features.dtype == np.float32
        assert loaded.paths.tolist() == ["a"] * 3


def test_permutation_file_is_read_and_checked(tmp_path):
    permutation = cases.sysu_permutation(np.random.default_rng(0), {(1, 1): 3, (6, 2): 12}, 2)
    path = cases.write_permutation(tmp_path / "rand_perm_cam.mat", permutation)
    loaded = load_permutation(path)
    assert loaded[1, 1].tolist() == permutation[1][1]
    assert loaded[6, 2].tolist() == permutation[6][2]
    assert (3, 1) not in loaded

    permutation[1][1][4] = [1, 2, 2]
    cases.write_permutation(path, permutation)
    with pytest.raises(UserError, match=r"rand_perm_cam.mat: rand_perm_cam\{1\}\{1\} must be"):
        load_permutation(path)
    path.write_bytes(b"MATLAB?")
    with pytest.raises(UserError, match="no readable MATLAB 5 file"):
        load_permutation(path)
    with pytest.raises(UserError, match="no such file"):
        load_permutation(tmp_path / "none.mat")
