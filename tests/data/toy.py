"""A split of a few JPEG images in memory, picklable for worker and child processes."""

import hashlib
import io

import numpy as np
from PIL import Image

from mpanet_jax.datasets.schema import INFRARED, VISIBLE, Split

SIZE = dict(height=24, width=12)
PLAN = dict(num_ids_per_batch=4, images_per_id=4, seed=3, num_epochs=3)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def toy_split(counts: list[tuple[int, int]] = ((10, 13), (12, 11), (11, 11), (1, 4), (15, 10), (14, 14))) -> Split:
    """One identity for each pair (visible images, infrared images); pids are 11, 21, 31, ...

    By default they have 5, 5, 5, 1, 5 and 7 groups of `PLAN`: 7 batches an epoch.
    """
    generator = np.random.default_rng(0)
    pids, modality, encoded = [], [], []
    for number, images in enumerate(counts, start=1):
        for kind, count in zip((VISIBLE, INFRARED), images, strict=True):
            for _ in range(count):
                height, width = generator.integers(16, 40), generator.integers(8, 20)
                encoded.append(jpeg(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)))
                pids.append(10 * number + 1)
                modality.append(kind)
    modality = np.array(modality, np.int32)
    return Split(
        name="toy/train",
        pids=np.array(pids, np.int32),
        camids=1 + 2 * modality,
        modality=modality,
        paths=np.array([f"cam/{i:04d}.jpg" for i in range(len(pids))]),
        encoded=encoded,
        fingerprint="toy0",
    )


def batch_hash(batch: dict[str, np.ndarray], device_images=None) -> str:
    """Of everything that a training step sees of a batch, whichever mode feeds it."""
    if device_images is not None:
        batch = batch | {"images": np.asarray(device_images)[batch["index"]]}
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(f"{name}{batch[name].shape}{batch[name].dtype}".encode() + batch[name].tobytes())
    return digest.hexdigest()
