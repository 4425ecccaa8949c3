"""Embeddings of a list of images: the network over padded, masked batches of one shape."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Array

from mpanet_jax.embeddings import Embeddings
from mpanet_jax.progress import track

# (images uint8[b, h, w, 3], modality int32[b] or None) → embeddings float[b, d] on the device
Embed = Callable[[Any, Any], Array]


def track_batches(
    batches: Iterable[dict[str, np.ndarray]], total: int, *, active: bool = True
) -> Iterator[dict[str, np.ndarray]]:
    """Eval batches of `total` images, with a bar that counts those; `active` as of `progress.Bar`."""
    return track(batches, "embedding", total, size=lambda batch: int(batch["mask"].sum()), active=active)


def extract_embeddings(
    embed: Embed,
    batches: Iterable[dict[str, np.ndarray]],
    paths: np.ndarray,
) -> Embeddings:
    """Runs `embed` over eval batches.

    Args:
      embed: resized bytes to embeddings; compiled once, since all batches have one shape.
      batches: eval batches (docs/method.md); rows whose `mask` is False are padding and dropped.
      paths: str[N] of the whole split, indexed by the batches' `index`.

    Returns:
      One row an image, in the batches' order; features are float32 and not normalised.
    """
    features, pids, camids, modality, index = [], [], [], [], []
    waiting = None

    def collect(batch: dict[str, np.ndarray], embeddings: Array) -> None:
        rows = np.asarray(batch["mask"])
        features.append(np.asarray(embeddings, np.float32)[rows])
        pids.append(batch["pids"][rows])
        camids.append(batch["camids"][rows])
        modality.append(batch["modality"][rows])
        index.append(batch["index"][rows])

    for batch in batches:
        # The previous result is fetched only after the next batch has been sent off, so the device never waits.
        result = embed(batch["images"], batch["modality"])
        if waiting is not None:
            collect(*waiting)
        waiting = (batch, result)
    if waiting is not None:
        collect(*waiting)
    return Embeddings(
        np.concatenate(features),
        np.concatenate(pids),
        np.concatenate(camids),
        paths[np.concatenate(index)],
        np.concatenate(modality),
    )
