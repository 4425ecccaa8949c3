"""Every loss against loops over the formula, and against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpanet_jax import losses
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings

P, K, NUM_IDS, DIM = 3, 4, 5, 7
LABELS = jnp.repeat(jnp.array([4, 0, 2], jnp.int32), K)
MODALITY = jnp.tile(jnp.array([0, 0, 1, 1], jnp.int32), P)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def softmax(row):
    exponentials = [np.exp(x) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def test_identity_loss_is_the_sum_of_two_means():
    logits = draw(P * K, NUM_IDS)
    by_modality = {0: [], 1: []}
    for row, label, modality in zip(logits, LABELS, MODALITY, strict=True):
        by_modality[int(modality)].append(-np.log(softmax(row)[label]))
    expected = np.mean(by_modality[0]) + np.mean(by_modality[1])
    np.testing.assert_allclose(losses.identity_loss(logits, LABELS, MODALITY), expected, rtol=1e-12)
    one_mean = np.mean(by_modality[0] + by_modality[1])
    np.testing.assert_allclose(losses.identity_loss(logits, LABELS, MODALITY, per_modality=False), one_mean, rtol=1e-12)


def test_identity_loss_of_equal_logits_is_twice_log_n():
    np.testing.assert_allclose(losses.identity_loss(jnp.zeros((12, 5)), LABELS, MODALITY), 2 * np.log(5), rtol=1e-12)


def test_identity_loss_weighs_modalities_equally_when_their_counts_differ():
    logits = draw(4, NUM_IDS)
    labels, modality = jnp.array([0, 1, 2, 3]), jnp.array([0, 0, 0, 1])
    values = [-np.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(
        losses.identity_loss(logits, labels, modality), np.mean(values[:3]) + values[3], rtol=1e-12
    )


def test_modality_identity_loss_reads_each_images_own_classifier():
    visible, infrared = draw(P * K, NUM_IDS, seed=1), draw(P * K, NUM_IDS, seed=2)
    by_modality = {0: [], 1: []}
    for b in range(P * K):
        own = visible if MODALITY[b] == 0 else infrared
        by_modality[int(MODALITY[b])].append(-np.log(softmax(own[b])[LABELS[b]]))
    expected = np.mean(by_modality[0]) + np.mean(by_modality[1])
    np.testing.assert_allclose(losses.modality_identity_loss(visible, infrared, LABELS, MODALITY), expected, rtol=1e-12)


def test_separation_loss_by_hand():
    # Two positions, three maps. Overlaps: m1·m2 = 1·0 + 0·1 = 0, m1·m3 = 0.5, m2·m3 = 0.25; mean of the 3 pairs 0.25.
    maps = jnp.array([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.25]]])
    np.testing.assert_allclose(losses.separation_loss(maps), 0.25, rtol=1e-12)
    # It is a sum over positions: the same maps twice as large cost twice as much. The batch is averaged.
    doubled = jnp.concatenate([maps, maps], axis=1)
    np.testing.assert_allclose(losses.separation_loss(doubled), 0.5, rtol=1e-12)
    both = jnp.stack([doubled[0], jnp.zeros_like(doubled[0])])
    np.testing.assert_allclose(losses.separation_loss(both), 0.25, rtol=1e-12)


def test_separation_loss_without_pairs_is_zero():
    assert losses.separation_loss(jnp.ones((2, 6, 0))) == 0
    assert losses.separation_loss(jnp.ones((2, 6, 1))) == 0


@pytest.mark.parametrize("margin", [0.7, 4.0])
def test_center_cluster_loss_by_loops(margin):
    features = draw(P * K, DIM)
    centers = {label: features[label == LABELS].mean(0) for label in set(LABELS.tolist())}
    pull = np.mean([np.linalg.norm(features[b] - centers[int(LABELS[b])]) for b in range(P * K)])
    push, order = 0.0, sorted(centers)
    for k in range(P - 1):
        for j in range(k + 1, P):
            push += max(0.0, margin - np.linalg.norm(centers[order[k]] - centers[order[j]]))
    expected = pull + 2 / (P * (P - 1)) * push
    assert margin < 1 or push > 0
    np.testing.assert_allclose(
        losses.center_cluster_loss(features, images_per_id=K, margin=margin), expected, rtol=1e-12
    )


def test_center_cluster_loss_by_hand():
    # Identities at 0 and 0.5 on a line, each image 0.1 off its centre: 0.1 + (0.7 − 0.5).
    features = jnp.array([[-0.1], [0.1], [0.4], [0.6]])
    np.testing.assert_allclose(losses.center_cluster_loss(features, images_per_id=2, margin=0.7), 0.3, rtol=1e-12)


def test_center_cluster_gradient_is_finite_where_features_coincide():
    features = jnp.concatenate([jnp.ones((4, 3)), jnp.ones((4, 3))])
    gradient = jax.grad(lambda f: losses.center_cluster_loss(f, images_per_id=4, margin=0.7))(features)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("student_first", [False, True])
def test_mutual_mean_loss_by_loops(student_first):
    visible, infrared, mean_visible, mean_infrared = (draw(P * K, NUM_IDS, seed=s) for s in range(4))
    by_modality = {0: [], 1: []}
    for b in range(P * K):
        own = softmax((visible if MODALITY[b] == 0 else infrared)[b])
        teacher = softmax((mean_infrared if MODALITY[b] == 0 else mean_visible)[b])
        first, second = (own, teacher) if student_first else (teacher, own)
        by_modality[int(MODALITY[b])].append(sum(p * np.log(p / q) for p, q in zip(first, second, strict=True)))
    expected = np.mean(by_modality[0]) + np.mean(by_modality[1])
    if student_first:
        expected = np.mean(by_modality[0] + by_modality[1])
    actual = losses.mutual_mean_loss(
        visible, infrared, mean_visible, mean_infrared, MODALITY, student_first=student_first
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("student_first", [False, True])
def test_no_gradient_through_the_mean_classifiers(student_first):
    logits = draw(P * K, NUM_IDS)

    def loss(own, mean):
        return losses.mutual_mean_loss(own, own, mean, mean, MODALITY, student_first=student_first)

    own_gradient, mean_gradient = jax.grad(loss, argnums=(0, 1))(logits, logits[::-1])
    assert np.abs(own_gradient).max() > 0
    assert not mean_gradient.any()


def test_the_loss_weighs_each_term_by_its_name():
    # The sum itself is the step's: tests/test_step.py.
    values = {
        "identity": 1.0,
        "center_cluster": 10.0,
        "separation": 100.0,
        "modality_identity": 1e3,
        "mutual_mean": 1e4,
    }
    weights = MPANet(MPANetSettings()).loss_weights()
    assert set(weights) == set(values)
    assert sum(weights[name] * value for name, value in values.items()) == 1 + 10 + 50 + 500 + 25_000
