"""Grad-CAM against its formula in NumPy, from the network's arrays alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpanet_jax.data.augment import normalize
from mpanet_jax.errors import UserError
from mpanet_jax.report.pattern_maps import grad_cam, targets_of
from tests.report.sources import model, source


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(network, images, targets):
    """Eq. 4 to 6, the neck, the score and its gradient, in float64, from F and the parameters of PAM and the neck."""
    pixels = normalize(jnp.asarray(np.stack([np.asarray(image) for image in images])), np.float32)
    options = {"train": False, "mutable": ["intermediates"], "capture_intermediates": True}
    _, state = jax.jit(lambda variables: network.network.apply(variables, pixels, **options))(network.variables)
    feature_map = np.asarray(state["intermediates"]["mam4"]["__call__"][0], np.float64)
    batch, height, width, channels = feature_map.shape
    flat = feature_map.reshape(batch, height * width, channels)
    params, statistics = network.variables["params"], network.variables["batch_stats"]["neck"]
    maps = sigmoid(flat @ np.asarray(params["pam"]["kernel"], np.float64) + np.asarray(params["pam"]["bias"]))
    patterns = np.einsum("bnl,bnc->blnc", maps, flat)
    pooled = np.concatenate([patterns.mean(2), flat.mean(1)[:, None]], axis=1).reshape(batch, -1)
    slope = np.asarray(params["neck"]["scale"], np.float64) / np.sqrt(np.asarray(statistics["var"], np.float64) + 1e-5)
    embedding = (pooled - np.asarray(statistics["mean"])) * slope
    norm = np.linalg.norm(embedding, axis=1, keepdims=True)
    itself = np.isnan(targets).any(1, keepdims=True)
    direction = np.where(itself, embedding, targets)
    direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    cosine = (embedding * direction).sum(1, keepdims=True) / norm
    gradient = np.where(itself, direction, direction / norm - cosine * embedding / norm**2) * slope
    weights = gradient.reshape(batch, -1, channels)[:, :-1] / (height * width)
    cam = np.maximum(np.einsum("blc,blnc->bln", weights, patterns), 0)
    return embedding, cam.reshape(*cam.shape[:2], height, width)


def test_grad_cam_is_its_formula():
    people = source()
    rows = np.array([0, 2, 5, 16])  # the last has no image in the other modality
    targets = targets_of(people.images.pids, people.modality, people.images.features, rows)
    assert np.isnan(targets).all(1).tolist() == [False, False, False, True]
    unit = people.images.features / np.linalg.norm(people.images.features, axis=1, keepdims=True)
    np.testing.assert_allclose(targets[0], unit[[2, 3]].mean(0), rtol=1e-5)  # infrared, of a visible one
    images = [people.photo(str(people.images.paths[row])) for row in rows]
    embedding, expected = by_hand(people.model, images, targets)
    np.testing.assert_allclose(embedding, people.images.features[rows], rtol=2e-3, atol=2e-3)
    found = grad_cam(people.model, images, targets)
    assert found.shape == expected.shape and found.shape[1] == 6
    assert (expected.max((1, 2, 3)) > 0).all()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * expected.max())


def test_a_network_without_pam_is_refused():
    plain = model(**{"model.pattern_module": "none"})
    with pytest.raises(UserError, match=r"model\.pattern_module = 'none'"):
        grad_cam(plain, [source().photo("0/v0.png")], np.ones((1, 4), np.float32))
