"""Pairs, curves and calibrations against scikit-learn, scipy and loops over single pairs."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from mpanet_jax.datasets import make_protocol
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.calibration import (
    Calibration,
    Logistic,
    calibrate,
    fit_logistic,
    measure_calibration,
)
from mpanet_jax.evaluation.pair_score import calibration_path, score_pair
from mpanet_jax.evaluation.verification import (
    CROSS,
    SAME,
    Pairs,
    area_under,
    equal_error_rate,
    join_embeddings,
    make_curve,
    make_pairs,
    split_identities,
    true_positive_rate_at,
)


def people(num_ids=20, images=6, noise=0.5, seed=0, dimension=8):
    """Images of people in cameras 1 and 2 (visible) and 3 (infrared)."""
    generator = np.random.default_rng(seed)
    pids = np.repeat(np.arange(num_ids), images)
    camids = np.tile(np.arange(images) % 3 + 1, num_ids)
    centres = generator.standard_normal((num_ids, dimension))
    features = centres[pids] + noise * generator.standard_normal((len(pids), dimension))
    paths = np.array([f"{pid}/{n}.jpg" for n, pid in enumerate(pids)])
    return Embeddings(features.astype(np.float32), pids, camids, paths, (camids == 3).astype(np.int64))


def drawn_pairs(same=400, different=3000, ties=False, seed=0):
    generator = np.random.default_rng(seed)
    similarity = np.concatenate([generator.normal(0.5, 0.25, same), generator.normal(0, 0.25, different)])
    similarity = np.round(similarity, 1) if ties else similarity
    return Pairs(similarity.astype(np.float32), np.arange(same + different) < same)


@pytest.mark.parametrize("kind", [CROSS, SAME])
def test_pairs_are_those_of_a_loop(kind):
    embeddings = people(4, 5)
    embeddings.camids[0] = -1
    pairs = make_pairs(embeddings, embeddings.camids, kind)
    expected = []
    for i, j in itertools.combinations(range(len(embeddings)), 2):
        one_place = embeddings.camids[i] == embeddings.camids[j] != -1
        if one_place or (embeddings.modality[i] == embeddings.modality[j]) != (kind == SAME):
            continue
        a, b = (embeddings.features[k].astype(np.float64) for k in (i, j))
        expected.append((a @ b / np.sqrt((a @ a) * (b @ b)), embeddings.pids[i] == embeddings.pids[j]))
    assert sorted(pairs.same.tolist()) == sorted(bool(same) for _, same in expected)
    for sort in (True, False):
        found = np.sort(pairs.similarity[pairs.same == sort])
        np.testing.assert_allclose(found, np.sort([s for s, same in expected if same == sort]), atol=1e-6)


def test_rooms_of_sysu_mm01_are_one_place():
    embeddings = people()
    places = make_protocol("sysu_mm01_random").places(embeddings)
    assert not np.isin(embeddings.camids[places == 2], [1]).any()
    assert set(embeddings.camids[places == 2]) == {2, 3}


def test_too_many_pairs_are_drawn_from():
    embeddings = people(60)
    every, some = (make_pairs(embeddings, embeddings.camids, CROSS, most=most) for most in (10**9, 3000))
    assert every.share == 1 and 0 < some.share < 1
    assert some.same.sum() == every.same.sum()
    assert abs((~some.same).sum() - 3000) < 300
    assert np.isin(some.similarity, every.similarity).all()
    again = make_pairs(embeddings, embeddings.camids, CROSS, most=3000)
    np.testing.assert_array_equal(some.similarity, again.similarity)


def test_unknown_modality_is_refused():
    embeddings = people(2)
    embeddings.modality[3] = -1
    with pytest.raises(UserError, match=embeddings.paths[3]):
        make_pairs(embeddings, embeddings.camids, CROSS)


@pytest.mark.parametrize("ties", [False, True])
def test_curve_equals_scikit_learns(ties):
    pairs = drawn_pairs(ties=ties)
    curve = make_curve(pairs)
    fpr, tpr, thresholds = roc_curve(pairs.same, pairs.similarity, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positive_rate, fpr)
    np.testing.assert_allclose(curve.true_positive_rate, tpr)
    np.testing.assert_allclose(curve.thresholds, thresholds)
    assert math.isclose(area_under(curve), roc_auc_score(pairs.same, pairs.similarity))


def test_equal_error_rate():
    # Of 4 same pairs one lies below 0.5, of 4 different ones one above: a quarter of either sort is wrong there.
    pairs = Pairs(np.array([0.9, 0.8, 0.7, 0.1, 0.6, 0.3, 0.2, 0.0], np.float32), np.arange(8) < 4)
    assert equal_error_rate(make_curve(pairs)) == 0.25
    assert equal_error_rate(make_curve(Pairs(np.array([0.9, 0.1], np.float32), np.array([True, False])))) == 0
    assert equal_error_rate(make_curve(Pairs(np.zeros(4, np.float32), np.arange(4) < 1))) == 0.5  # one tie of all
    curve = make_curve(drawn_pairs(20000, 20000))
    # Two normal distributions of deviation 0.25, half a unit apart: Φ(−1).
    assert abs(equal_error_rate(curve) - 0.15866) < 0.005


@pytest.mark.parametrize("ties", [False, True])
def test_rate_at_few_false_positives(ties):
    pairs = drawn_pairs(ties=ties)
    curve = make_curve(pairs)
    allowed = [
        np.mean(pairs.similarity[pairs.same] >= threshold)
        for threshold in [*pairs.similarity, np.inf]
        if np.mean(pairs.similarity[~pairs.same] >= threshold) <= 0.01
    ]
    assert math.isclose(true_positive_rate_at(curve, 0.01), max(allowed))
    assert true_positive_rate_at(curve, 1e-3) is None  # three of 3,000 pairs
    assert true_positive_rate_at(curve, 1 / 300) is not None  # ten


@pytest.mark.parametrize("separable", [False, True])
def test_line_equals_scikit_learns(separable):
    pairs = drawn_pairs()
    if separable:
        pairs = Pairs(pairs.similarity + 3 * pairs.same.astype(np.float32), pairs.same)
    line = fit_logistic(pairs)
    count = {sort: int((pairs.same == sort).sum()) for sort in (True, False)}
    target = np.where(pairs.same, (count[True] + 1) / (count[True] + 2), 1 / (count[False] + 2))
    weight = 0.5 / np.where(pairs.same, count[True], count[False])
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10000, solver="newton-cholesky")
    x = np.tile(pairs.similarity, 2)[:, None].astype(np.float64)
    labels = np.repeat([1, 0], len(target))
    reference.fit(x, labels, 1e4 * np.concatenate([weight * target, weight * (1 - target)]))
    np.testing.assert_allclose(line.slope, reference.coef_[0, 0], rtol=1e-3)
    np.testing.assert_allclose(line.intercept, reference.intercept_[0], rtol=1e-3)


def test_probability_is_bayes_rule():
    # Two normal distributions: the likelihood ratio is known, e^(8 s − 2) for means 0.5 and 0, deviation 0.25.
    line = fit_logistic(drawn_pairs(50000, 50000))
    assert abs(line.slope - 8) < 0.2 and abs(line.intercept + 2) < 0.1
    line = Logistic(8.0, -2.0)
    for prior in (0.5, 0.01):
        odds = np.exp(8 * 0.4 - 2) * prior / (1 - prior)
        assert math.isclose(line.probability(0.4, prior), odds / (1 + odds))


@pytest.mark.parametrize("prior", [0.5, 0.1])
def test_reliability_of_a_right_line(prior):
    values = measure_calibration(drawn_pairs(30000, 60000), Logistic(8.0, -2.0), prior)
    assert values["pairs"] == {"same": 30000, "different": 60000, "share_of_different": 1.0}
    assert math.isclose(sum(b["weight"] for b in values["reliability"]), 1)
    assert sum(b["pairs"] for b in values["reliability"]) == 90000
    for b in values["reliability"]:
        assert b["from"] <= b["probability"] <= b["to"] and abs(b["probability"] - b["same"]) < 0.05
    assert values["calibration_error"] < 0.01
    assert measure_calibration(drawn_pairs(30000, 60000), Logistic(8.0, 0.0), prior)["calibration_error"] > 0.04
    rates = [point["fpr"] for point in values["roc"]]
    assert rates == sorted(rates) and rates[-1] == 1 and len(rates) > 20


def test_halves_of_identities_do_not_meet():
    pids = people(21).pids
    first, second = split_identities(pids, 0)
    assert not set(pids[first]) & set(pids[second]) and (first | second).all()
    assert (len(set(pids[first])), len(set(pids[second]))) == (10, 11)
    assert (split_identities(pids, 0)[0] == first).all() and (split_identities(pids, 1)[0] != first).any()


@pytest.fixture
def calibration():
    return calibrate(people(40), model="here", fingerprint="abc", data="people", seed=3)


def test_calibration_reports_on_the_other_half(calibration):
    embeddings = people(40)
    halves = split_identities(embeddings.pids, 3)
    for kind in (CROSS, SAME):
        fitted, tested = (make_pairs(embeddings.take(h), embeddings.camids[h], kind) for h in halves)
        assert calibration.logistic(kind) == fit_logistic(fitted)
        test = calibration.kinds[kind]["test"]
        assert math.isclose(test["auc"], roc_auc_score(tested.same, tested.similarity))
        assert test["pairs"]["same"] == tested.same.sum()
    assert calibration.identities == {"calibration": 20, "test": 20}


def test_file_round_trip_and_bad_files(calibration, tmp_path):
    path = calibration_path(tmp_path)
    assert path == tmp_path / "calibration.json"
    assert calibration_path(tmp_path / "a.pth").name == "a.pth.calibration.json"
    calibration.write(path)
    assert Calibration.read(path) == calibration
    whole = json.loads(path.read_text())
    for change in ({"format": "other"}, {"prior": 2}, {"kinds": {CROSS: {"slope": 1}}}, {"surplus": 1}):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=r"calibration\.json"):
            Calibration.read(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"calibration\.json"):
        Calibration.read(path)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        Calibration.read(tmp_path / "nowhere.json")


def score(calibration, modality=(0, 1), prior=None, fingerprint="abc", source="/nowhere"):
    rows = np.array([[1.0, 0.0], [0.6, 0.8]])
    options = {"fingerprint": fingerprint, "source": source, "calibration": calibration, "prior": prior}
    return score_pair(rows, np.array(modality), path=calibration_path(source), **options)


def test_score_of_a_pair(calibration, tmp_path):
    found = score(calibration)
    line = calibration.logistic(CROSS)
    assert math.isclose(found.similarity, 0.6) and (found.kind, found.prior) == (CROSS, 0.5)
    assert math.isclose(found.probability, expit(0.6 * line.slope + line.intercept))
    rare = score(calibration, modality=(1, 1), prior=0.001)
    line = calibration.logistic(SAME)
    assert math.isclose(logit(rare.probability), 0.6 * line.slope + line.intercept + math.log(0.001 / 0.999))
    # Without a calibration, or without the modality, there is no probability, and a reason.
    for none in (score(None), score(calibration, modality=(-1, 1))):
        assert none.probability is None and none.prior is None and none.note
    calibration.write(calibration_path(tmp_path))
    assert score(None, source=str(tmp_path)) == found
    with pytest.raises(UserError, match="another model"):
        score(calibration, fingerprint="xyz")
    for prior in (0, 1, -0.5, math.nan, "x", True):
        with pytest.raises(ArgumentError, match="prior"):
            score(calibration, prior=prior)


def test_one_camera_a_modality_has_cross_pairs_only():
    embeddings = people(20)
    one = embeddings.take(embeddings.camids > 1)
    calibration = calibrate(one, model="here", fingerprint="abc", data="people")
    assert set(calibration.kinds) == {CROSS}
    found = score(calibration, modality=(0, 0))
    assert found.probability is None and CROSS in found.note
    with pytest.raises(UserError, match="people"):
        calibrate(one.take(one.pids < 1), model="here", fingerprint="abc", data="people")


def test_images_of_one_path_are_two_unless_all_is_the_same():
    embeddings = people(4)
    other = dataclasses.replace(embeddings, features=embeddings.features[::-1].copy())
    assert len(join_embeddings([embeddings, embeddings])) == len(embeddings)
    assert len(join_embeddings([embeddings, other])) == 2 * len(embeddings)


def test_people_that_are_numbered_differently_are_refused():
    embeddings = people(4)
    names = [np.array([f"{prefix}{pid}" for pid in embeddings.pids]) for prefix in "ab"]
    one, two = (dataclasses.replace(embeddings, pid_names=of) for of in names)
    assert len(join_embeddings([one, one])) == len(embeddings)
    with pytest.raises(UserError, match=r"is both a\d+ and b\d+"):
        join_embeddings([one, two])
