"""Which people a picture shows: those that are named, or some that are drawn by a seed."""

from collections.abc import Sequence

import numpy as np

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.modality import INFRARED, VISIBLE
from mpanet_jax.report.sources import Source


def people_with_both(source: Source) -> np.ndarray:
    """The identities, ascending, of which there are visible and infrared images."""
    visible, infrared = (source.images.pids[source.modality == modality] for modality in (VISIBLE, INFRARED))
    found = np.intersect1d(visible, infrared)
    return found[found >= 0]


def choose_people(candidates: np.ndarray, number: int, seed: int, where: str) -> np.ndarray:
    """`number` of the identities, drawn by the seed, in ascending order.

    Raises:
      UserError: there are fewer; the message says how many, and calls the images `where`.
    """
    if len(candidates) < number:
        raise UserError(
            f"{where}: has {len(candidates)} identities with visible and infrared images, and {number} are to be "
            f"shown; ask for {len(candidates)} at most, or name other images"
        )
    return np.sort(np.random.default_rng(seed).choice(candidates, number, replace=False))


def named_people(source: Source, names: Sequence[str]) -> np.ndarray:
    """The identities that the data set calls so, in this order.

    Raises:
      ArgumentError: one has no images.
    """
    known = {source.name_of(row): int(source.images.pids[row]) for row in range(len(source.images))}
    for name in names:
        if name not in known:
            some = ", ".join(list(known)[:5])
            raise ArgumentError("people", f"= {name}: no image of {source.title} is of this identity; it has {some} …")
    return np.array([known[name] for name in names])
