"""Chooses the people that a picture shows: by name, or at random."""

from collections.abc import Sequence

import numpy as np

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.modality import INFRARED, VISIBLE
from mpanet_jax.report.sources import Source


def people_with_both(source: Source) -> np.ndarray:
    """The identities that have both visible and infrared images, ascending."""
    visible, infrared = (source.images.pids[source.modality == modality] for modality in (VISIBLE, INFRARED))
    found = np.intersect1d(visible, infrared)
    return found[found >= 0]


def choose_people(candidates: np.ndarray, number: int, seed: int, where: str) -> np.ndarray:
    """Choose identities at random.

    Args:
      candidates: int[n], the identities to choose from.
      number: how many to choose.
      seed: seeds the choice.
      where: what an error calls the images.

    Returns:
      The chosen identities, ascending.

    Raises:
      UserError: there are fewer than `number`; the message says how many.
    """
    if len(candidates) < number:
        raise UserError(
            f"{where}: has {len(candidates)} identities with visible and infrared images, fewer than the {number} to "
            f"show; ask for at most {len(candidates)} (num_identities), or give other images"
        )
    return np.sort(np.random.default_rng(seed).choice(candidates, number, replace=False))


def named_people(source: Source, names: Sequence[str]) -> np.ndarray:
    """Find identities by the names that the data set gives them.

    Returns:
      int[p], the identities in the order of `names`.

    Raises:
      ArgumentError: no image shows an identity of that name.
    """
    known = {source.name_of(row): int(source.images.pids[row]) for row in range(len(source.images))}
    for name in names:
        if name not in known:
            some = ", ".join(list(known)[:5])
            raise ArgumentError("people", f"= {name}: no image of {source.title} shows this identity; it has {some} …")
    return np.array([known[name] for name in names])
