"""A split of a few JPEG images in memory, picklable for worker and child processes."""

import hashlib
import io

import numpy as np
from PIL import Image

from mpanet_jax.data.pipeline import TrainFeed, train_feed
from mpanet_jax.data.sampling import BatchPlan
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, Split
from mpanet_jax.settings import DataSettings

SIZE = dict(height=24, width=12)
NUM_EPOCHS = 3


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def toy_split(counts: list[tuple[int, int]] = ((10, 13), (12, 11), (11, 11), (1, 4), (15, 10), (14, 14))) -> Split:
    """One identity for each pair (visible images, infrared images); pids are 11, 21, 31, ...

    By default they have 5, 5, 5, 1, 5 and 7 groups of `toy_plan`: 7 batches an epoch.
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
        parts=np.full(len(pids), ""),
    )


def toy_plan(split: Split, *, num_ids_per_batch: int = 4, images_per_id: int = 4, seed: int = 3) -> BatchPlan:
    return BatchPlan(split.pids, split.modality, num_ids_per_batch, images_per_id, seed)


def toy_feed(
    split: Split,
    plan: BatchPlan | None = None,
    *,
    cache: str = "auto",
    num_workers: int = 0,
    resize: str = "bilinear",
    resize_on: str = "auto",
    num_epochs: int = NUM_EPOCHS,
    **options,
) -> TrainFeed:
    """`train_feed` of small images by `toy_plan`, or by another plan."""
    plan = plan or toy_plan(split)
    data = DataSettings(
        **SIZE,
        num_ids_per_batch=plan.num_ids_per_batch,
        images_per_id=plan.images_per_id,
        resize=resize,
        resize_on=resize_on,
        cache=cache,
        num_workers=num_workers,
    )
    return train_feed(split, plan, data, num_epochs=num_epochs, **options)


def batch_hash(batch: dict[str, np.ndarray], device_images=None) -> str:
    """Of everything that a training step sees of a batch, whichever mode feeds it."""
    if device_images is not None:
        images = np.asarray(device_images)[batch["index"]]
        batch = batch | {"images": images.reshape(*images.shape[:2], -1, 3)}
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(f"{name}{batch[name].shape}{batch[name].dtype}".encode() + batch[name].tobytes())
    return digest.hexdigest()
