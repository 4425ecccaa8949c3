"""What a test protocol is: who is compared with whom. Each data set's file has its own; protocols compute no distances.

All of them drop queries that have no match in the gallery, and average the figures over several galleries (trials).
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.modality import INFRARED, MODALITY_NAMES, UNKNOWN, VISIBLE

NUM_TRIALS = 10


@dataclass(frozen=True)
class Setting:
    """One line of a table of results.

    Attributes:
      name: such as 'sysu/all/single'.
      galleries: int[g] for each trial: the rows of its gallery, ascending.
    """

    name: str
    galleries: list[Int[np.ndarray, " g"]]


@dataclass(frozen=True)
class Comparison:
    """Settings that share their queries, their gallery, and the rule for images that a query does not meet.

    Attributes:
      query, gallery: the embeddings.
      settings: the lines of the table.
      query_groups, gallery_groups: int[Q], int[G]; a query does not meet gallery images of its own group. A group is
        the room of a camera (SYSU-MM01), or identity and camera (LLCM); without such a rule (RegDB) all groups differ.
    """

    query: Embeddings
    gallery: Embeddings
    settings: list[Setting]
    query_groups: Int[np.ndarray, " q"]
    gallery_groups: Int[np.ndarray, " g"]


class Protocol:
    """How two sets of embeddings are compared; each protocol is a subclass.

    Attributes:
      name: in arguments, tables and metrics.json.
      metric: 'cosine' or 'euclidean', unless the caller chooses the other.
      cmc: 'identity' or 'image', unless the caller chooses the other; see docs/protocols.md.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "cosine"
    cmc: ClassVar[str] = "identity"

    def comparisons(self, query: Embeddings, gallery: Embeddings) -> list[Comparison]:
        """The comparisons of two sets.

        Args:
          query, gallery: embeddings that `check_pair` has accepted.

        Raises:
          UserError: they do not fit the protocol.
        """
        raise NotImplementedError

    def places(self, embeddings: Embeddings) -> Int[np.ndarray, " n"]:
        """int[N]: where each image was taken, -1 unknown: its camera. Verification leaves out pairs of one place."""
        return embeddings.camids


def check_pair(query: Embeddings, gallery: Embeddings) -> None:
    """Checks that two sets can be compared.

    Raises:
      UserError: their vectors have different lengths, an identity is unknown, or a pid has two names.
    """
    if query.features.shape[1] != gallery.features.shape[1]:
        raise UserError(
            f"{query.source} has {query.features.shape[1]}-dimensional features, {gallery.source} "
            f"{gallery.features.shape[1]}-dimensional ones; extract both with the same model"
        )
    for embeddings in (query, gallery):
        unknown = np.flatnonzero(embeddings.pids < 0)
        if len(unknown):
            raise UserError(
                f"{embeddings.source}: {len(unknown)} of {len(embeddings)} pids are negative (unknown), the first of "
                f"{embeddings.paths[unknown[0]]}; store every image's identity"
            )
    named = [e for e in (query, gallery) if e.pid_names is not None]
    names = {}
    for pid, name in (pair for e in named for pair in zip(e.pids.tolist(), np.asarray(e.pid_names), strict=False)):
        if names.setdefault(pid, name) != name:
            raise UserError(
                f"{query.source}, {gallery.source}: pid {pid} is both {names[pid]!s} and {name!s}; extract both from "
                "one images.csv, which numbers its people"
            )


# ---- who may meet whom ----


def compare_all(query: Embeddings, gallery: Embeddings, settings: list[Setting]) -> Comparison:
    """A comparison in which every query meets every gallery image."""
    return Comparison(query, gallery, settings, np.zeros(len(query), int), np.ones(len(gallery), int))


def compare_across_cameras(query: Embeddings, gallery: Embeddings, settings: list[Setting]) -> Comparison:
    """A comparison in which a query meets no image of its own identity and camera, if its camera is known."""
    pairs = np.stack([np.concatenate([query.pids, gallery.pids]), np.concatenate([query.camids, gallery.camids])], 1)
    groups = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    groups = np.where(pairs[:, 1] == UNKNOWN, -1 - np.arange(len(groups)), groups)  # a group of its own
    return Comparison(query, gallery, settings, groups[: len(query)], groups[len(query) :])


# ---- galleries ----


def images_by_identity_and_camera(embeddings: Embeddings) -> dict[tuple[int, int], Int[np.ndarray, " n"]]:
    """{(pid, camid): rows of the images, in the order of their paths}, by ascending keys."""
    paths = np.char.replace(np.asarray(embeddings.paths, np.str_), "\\", "/")
    ranked = np.lexsort((paths, embeddings.camids, embeddings.pids))
    keys = np.stack([embeddings.pids[ranked], embeddings.camids[ranked]], axis=1)
    starts = np.flatnonzero(np.any(np.diff(keys, axis=0, prepend=keys[:1] - 1) != 0, axis=1))
    return {
        (int(pid), int(camid)): rows
        for (pid, camid), rows in zip(keys[starts], np.split(ranked, starts[1:]), strict=True)
    }


def one_image_each(embeddings: Embeddings) -> list[Int[np.ndarray, " g"]]:
    """Draws ten galleries of one image of each identity and camera; trial t uses Python's generator, seeded with t."""
    images, galleries = images_by_identity_and_camera(embeddings), []
    for trial in range(NUM_TRIALS):
        generator = random.Random(trial)
        galleries.append(np.sort([generator.choice(rows) for rows in images.values()]))
    return galleries


def everything(embeddings: Embeddings) -> list[Int[np.ndarray, " g"]]:
    """A single gallery, which has all images."""
    return [np.arange(len(embeddings))]


# ---- modalities ----


def known_modality(embeddings: Embeddings, cameras: Mapping[int, int]) -> Int[np.ndarray, " n"]:
    """The modality of each image: the stored one, or that of its camera where none is stored.

    Args:
      embeddings: the images.
      cameras: {camid: modality} for cameras that have one modality.

    Returns:
      int[N]: VISIBLE or INFRARED.

    Raises:
      UserError: neither tells an image's modality, or the two differ.
    """
    assert embeddings.modality is not None  # see `check_embeddings`
    by_camera = np.array([cameras.get(camid, UNKNOWN) for camid in embeddings.camids.tolist()])
    stored = embeddings.modality
    both = (stored != UNKNOWN) & (by_camera != UNKNOWN)
    for row in np.flatnonzero(both & (stored != by_camera))[:1]:
        raise UserError(
            f"{embeddings.source}: modality[{row}] ({embeddings.paths[row]}) is {MODALITY_NAMES[int(stored[row])]}, "
            f"but camera {embeddings.camids[row]} is {MODALITY_NAMES[int(by_camera[row])]}; correct one of the two"
        )
    modality = np.where(stored == UNKNOWN, by_camera, stored)
    for row in np.flatnonzero(modality == UNKNOWN)[:1]:
        raise UserError(
            f"{embeddings.source}: nothing says whether image {row} ({embeddings.paths[row]}), of camera "
            f"{embeddings.camids[row]}, is visible or infrared; store an array modality int[{len(embeddings)}], "
            f"{VISIBLE} visible and {INFRARED} infrared"
        )
    return modality


def visible_and_infrared(
    first: Embeddings, second: Embeddings, cameras: Mapping[int, int]
) -> tuple[Embeddings, Embeddings]:
    """Orders two sets, of one modality each, as (visible, infrared).

    Args:
      first, second: the sets, in any order.
      cameras: as in `known_modality`.

    Raises:
      UserError: a set holds both modalities, both sets hold the same one, or a modality is unknown.
    """
    found = []
    for embeddings in (first, second):
        values = np.unique(known_modality(embeddings, cameras))
        if len(values) > 1:
            raise UserError(f"{embeddings.source}: holds visible and infrared images; expected one modality a file")
        found.append(int(values[0]))
    if found[0] == found[1]:
        raise UserError(
            f"{first.source} and {second.source} are both {MODALITY_NAMES[found[0]]}; expected one of each modality"
        )
    return (first, second) if found[0] == VISIBLE else (second, first)


def both_directions(visible: Embeddings, infrared: Embeddings) -> Iterator[tuple[str, Embeddings, Embeddings]]:
    """Yields ('visible_to_infrared', query, gallery), then ('infrared_to_visible', query, gallery)."""
    yield "visible_to_infrared", visible, infrared
    yield "infrared_to_visible", infrared, visible
