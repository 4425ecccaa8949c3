"""The augmented batch that is shown against the one that the training step gives its network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mpanet_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import ArgumentError
from mpanet_jax.log_pictures import choose_people, cross_modality_distances, denormalize, overlay_maps, tile_images
from mpanet_jax.methods.mpanet import MPANet, MPANetSettings
from mpanet_jax.report.augmented import augmented_batch
from mpanet_jax.settings_base import replace
from mpanet_jax.state import random_keys
from tests.report.sources import FIELDS, known

HEIGHT, WIDTH = 64, 32


def encoded(index):
    from io import BytesIO

    pixels = np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def split(num_ids=4, each=4):
    number = num_ids * each
    pids, modality = np.repeat(np.arange(num_ids), each), np.tile(np.repeat([0, 1], each // 2), num_ids)
    paths = np.array([f"{i}.png" for i in range(number)])
    files = [encoded(i) for i in range(number)]
    return Split("toy", pids, modality + 1, modality, paths, files, "toy", np.full(number, ""))


@pytest.fixture(scope="module")
def method():
    changes = {"data.num_ids_per_batch": 2, "data.images_per_id": 4, "train.num_epochs": 3}
    return MPANet(replace(MPANetSettings(), FIELDS | changes))


def test_batch_is_what_the_network_sees_at_that_step(method):
    images, step = split(), 3
    shown = augmented_batch(method, images, step)
    # The batch of the whole training, and the key of that step, once more from the plan and the seed.
    plan = method.batch_plan(images.pids, images.modality, 2)
    epoch, place = divmod(step, plan.steps_per_epoch)
    np.testing.assert_array_equal(shown.rows, plan.epoch(epoch)[place])
    decoded = np.stack(
        [np.random.default_rng(int(row)).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for row in shown.rows]
    )
    np.testing.assert_array_equal(shown.images, decoded)
    key = jax.random.fold_in(random_keys(method.settings.seed)[1], step)
    rows = {"labels": jnp.asarray(images.pids[shown.rows]), "modality": jnp.asarray(images.modality[shown.rows])}
    seen, _ = method.views(key, jnp.asarray(decoded), rows, 0)
    bytes_again = np.clip((np.asarray(seen) * IMAGENET_STD + IMAGENET_MEAN) * 255, 0, 255)
    assert shown.views.shape == (1, *decoded.shape)
    np.testing.assert_allclose(shown.views[0], bytes_again, atol=0.51)
    assert (shown.views[0] != decoded).any()
    with pytest.raises(ArgumentError, match=f"0 to {3 * plan.steps_per_epoch - 1}"):
        augmented_batch(method, images, 3 * plan.steps_per_epoch)


def test_pictures_of_the_log():
    assert denormalize(jnp.zeros((1, 2, 2, 3)))[0, 0, 0].tolist() == [round(255 * m) for m in IMAGENET_MEAN]
    sheet = tile_images(np.zeros((3, 4, 2, 3), np.uint8), 2)
    assert sheet.shape == (10, 6, 3) and (sheet[6:, 4:] == 255).all() and not sheet[:4, :2].any()
    image = np.full((1, 4, 2, 3), 200, np.uint8)
    maps = np.array([[[[0.2, 0.6]], [[0.5, 0.5]]]])
    shown = overlay_maps(image, maps)
    assert shown.shape == (3, 4, 2, 3)
    assert (shown[0] == 200).all() and (shown[1][:, 0] == 30).all() and (shown[1][:, 1] == 200).all()
    assert (shown[2] == 30).all()  # the same everywhere: nothing stands out


def test_people_of_the_log_are_drawn_once_by_the_seed():
    images = split(num_ids=9)
    rows = choose_people(images, seed=5)
    np.testing.assert_array_equal(rows, choose_people(images, seed=5))
    assert images.modality[rows].tolist() == [0, 1] * 4 and len(set(images.pids[rows].tolist())) == 4
    np.testing.assert_array_equal(images.pids[rows][::2], images.pids[rows][1::2])
    assert rows.tolist() != choose_people(images, seed=6).tolist()


def test_distances_of_the_log_are_those_of_visible_to_infrared_images():
    generator = np.random.default_rng(0)
    pids, modality = np.arange(12) % 3, np.arange(12) // 6
    features = generator.normal(size=(12, 4)).astype(np.float32)
    same, different = cross_modality_distances(known(features, pids, modality).images, seed=0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = [(1 - unit[i] @ unit[j], pids[i] == pids[j]) for i in range(6) for j in range(6, 12)]
    np.testing.assert_allclose(np.sort(same), np.sort([d for d, one in expected if one]), atol=1e-5)
    np.testing.assert_allclose(np.sort(different), np.sort([d for d, one in expected if not one]), atol=1e-5)
