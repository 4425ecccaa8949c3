"""Embeddings and photos for the tests of the report."""

import functools
import zlib

import numpy as np
from PIL import Image

from mpanet_jax.embeddings import Embeddings
from mpanet_jax.modality import INFRARED, VISIBLE
from mpanet_jax.protocol import Protocol, Setting, compare_across_cameras, one_image_each

# Named as no data set would name them: they must stay text wherever they are shown.
WICKED = "<script>window.hacked=1</script>"


class CamerasProtocol(Protocol):
    """Infrared queries; galleries of one visible image each; no image of the query's identity and camera."""

    name = "cameras"

    def comparisons(self, query, gallery):
        return [compare_across_cameras(query, gallery, [Setting("cameras/single", one_image_each(gallery))])]


def people(num_ids, num_query, num_gallery, *, spread=1.0, seed=0, names=True):
    """(query, gallery): images of so many identities, around a direction each; the greater the spread, the harder."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(num_ids + 1, 16))

    def images(number, cameras, modality, folder):
        pids = np.arange(number) % num_ids
        camids = generator.choice(cameras, number)
        features = centres[pids] + spread * generator.normal(size=(number, 16))
        paths = np.array([f"{folder}/{pid:03}/{n:05}.jpg" for n, pid in enumerate(pids)])
        pid_names = np.array([WICKED if pid == 0 else f"person {pid}" for pid in pids]) if names else None
        return Embeddings(
            features.astype(np.float32), pids, camids, paths, np.full(number, modality), pid_names, source=folder
        )

    # Camera 2 is of both: what it saw of an identity is not in that query's gallery.
    return images(num_query, [2, 3, 6], INFRARED, "query"), images(num_gallery, [1, 2, 4], VISIBLE, "gallery")


@functools.cache
def _pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 12, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((48, 128)) for picture in pixels]


def photo(path):
    """A small picture, as large in a file as a photo of a person; which one differs by path."""
    return _pictures()[zlib.crc32(path.encode()) % 40]
