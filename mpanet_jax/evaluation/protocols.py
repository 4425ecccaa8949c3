"""Who is compared with whom: the test protocols of SYSU-MM01, RegDB and LLCM, and the embeddings they start from.

A protocol turns two sets of embeddings into `Comparison`s; it computes no distance. Common to all: queries without a
match left are dropped, and ten trials are averaged (RegDB: ten trained models, one for each split).
"""

import os
import random
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
from jaxtyping import Float32, Int

from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.metrics import squared_norms

NUM_TRIALS = 10
MULTI_SHOT = 10  # gallery images of an identity and camera in multi-shot
SYSU_QUERY_CAMERAS = (3, 6)
SYSU_GALLERY_CAMERAS = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
SYSU_ROOMS = {3: 2}  # camera 3 stands in camera 2's room

# What each protocol uses unless told otherwise: (metric, definition of the CMC).
DEFAULTS = {
    "sysu_mm01": ("cosine", "identity"),
    "sysu_mm01_random": ("cosine", "identity"),
    "regdb": ("euclidean", "identity"),
    "llcm": ("cosine", "identity"),
}


@dataclass(frozen=True)
class Embeddings:
    """N images as vectors.

    Attributes:
      features: float32[N, D], finite.
      pids, camids: int[N], as the data set numbers them.
      paths: str[N]; the last three parts of a SYSU-MM01 path name camera, identity and image: 'cam1/0007/0003.jpg'.
      source: what error messages call these embeddings, usually the file they came from.
    """

    features: Float32[np.ndarray, "n d"]
    pids: Int[np.ndarray, " n"]
    camids: Int[np.ndarray, " n"]
    paths: np.ndarray
    source: str = "embeddings"

    def __len__(self) -> int:
        return len(self.pids)


def load_embeddings(path: str | os.PathLike) -> Embeddings:
    """Read an `.npz` with `features` float[N, D], `pids` int[N], `camids` int[N], `paths` str[N], from any framework.

    Raises UserError, naming the file, for a missing file or array, a wrong shape or type, NaN or infinite features.
    """
    path = Path(path)
    fix = "expected an .npz with features float[N,D], pids int[N], camids int[N] and paths str[N]"
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ("features", "pids", "camids", "paths") if name not in archive]
            if missing:
                raise UserError(f"{path}: no array named {', '.join(missing)}; {fix}")
            arrays = {}
            for name in ("features", "pids", "camids", "paths"):
                try:
                    arrays[name] = archive[name]
                except ValueError as error:
                    raise UserError(
                        f"{path}: {name} holds Python objects; save it as a plain array, np.asarray({name}, dtype=...)"
                    ) from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {fix}") from error
    except UserError:
        raise
    except Exception as error:  # whatever numpy and zipfile say about a broken file
        raise UserError(f"{path}: not a readable .npz ({error}); {fix}") from error
    if arrays["paths"].dtype.kind == "S":
        arrays["paths"] = np.char.decode(arrays["paths"], "utf-8")
    return check_embeddings(Embeddings(**arrays, source=str(path)))


def check_embeddings(embeddings: Embeddings) -> Embeddings:
    """Return the embeddings with float32 features and int64 ids; raises UserError where they break the contract."""
    source, features = embeddings.source, np.asarray(embeddings.features)
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise UserError(f"{source}: features must be float[N,D], got {features.dtype}{list(features.shape)}")
    if not features.size:
        raise UserError(f"{source}: features is empty, {list(features.shape)}; expected at least one image")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(features, np.float32)
    ids = {}
    for name in ("pids", "camids"):
        values = np.asarray(getattr(embeddings, name))
        if values.shape != (len(features),) or values.dtype.kind not in "iu":
            raise UserError(
                f"{source}: {name} must be int[{len(features)}], one for each row of features, "
                f"got {values.dtype}{list(values.shape)}"
            )
        ids[name] = values.astype(np.int64)
    paths = np.asarray(embeddings.paths)
    if paths.shape != (len(features),) or paths.dtype.kind not in "UT":
        raise UserError(
            f"{source}: paths must be str[{len(features)}], one for each row of features, "
            f"got {paths.dtype}{list(paths.shape)}"
        )
    for row in np.flatnonzero(~np.isfinite(squared_norms(features))):  # or merely too large to square
        if not np.isfinite(features[row]).all():
            raise UserError(
                f"{source}: features[{row}] ({paths[row]}) holds NaN, an infinity or a value beyond float32; "
                "a model that diverged gives such features; expected finite ones"
            )
    return Embeddings(features, ids["pids"], ids["camids"], paths, source)


def save_embeddings(path: str | os.PathLike, embeddings: Embeddings) -> None:
    """Write `embeddings` as an uncompressed `.npz`; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            np.savez(
                file,
                features=np.asarray(embeddings.features, np.float32),
                pids=np.asarray(embeddings.pids),
                camids=np.asarray(embeddings.camids),
                paths=np.asarray(embeddings.paths, dtype=np.str_),
            )
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@dataclass(frozen=True)
class Setting:
    """One line of a results table.

    Attributes:
      name: 'sysu/all/single'.
      galleries: one ascending int array of gallery rows for each trial.
    """

    name: str
    galleries: list[Int[np.ndarray, " g"]]


@dataclass(frozen=True)
class Comparison:
    """Settings that share queries, gallery and the rule of what a query may not be compared with.

    Attributes:
      query, gallery: the embeddings.
      settings: lines of the table.
      query_groups, gallery_groups: int[Q], int[G]; a query never meets a gallery image of its own group
        (SYSU-MM01: the room a camera stands in; LLCM: identity and camera; RegDB: no such rule, all differ).
    """

    query: Embeddings
    gallery: Embeddings
    settings: list[Setting]
    query_groups: Int[np.ndarray, " q"]
    gallery_groups: Int[np.ndarray, " g"]


def comparisons(
    protocol: str, query: Embeddings, gallery: Embeddings, permutation: str | os.PathLike | None = None
) -> list[Comparison]:
    """Set up `protocol` (a key of DEFAULTS); raises UserError where the embeddings do not fit it."""
    if protocol not in DEFAULTS:
        raise UserError(f"--protocol: unknown protocol {protocol!r}; expected one of {', '.join(DEFAULTS)}")
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
    if protocol == "sysu_mm01":
        if permutation is None:
            raise UserError(
                "--permutation: protocol sysu_mm01 needs the data set's exp/rand_perm_cam.mat; name that file, "
                "or take --protocol sysu_mm01_random for a seeded random gallery"
            )
        return [_sysu(query, gallery, load_permutation(permutation), str(permutation))]
    if permutation is not None:
        raise UserError(f"--permutation: only protocol sysu_mm01 reads one; drop it for {protocol}")
    if protocol == "sysu_mm01_random":
        return [_sysu(query, gallery, None, "")]
    visible, infrared = _visible_and_infrared(query, gallery)
    if protocol == "regdb":
        return [
            _comparison("regdb/visible_to_infrared", visible, infrared, [np.arange(len(infrared))]),
            _comparison("regdb/infrared_to_visible", infrared, visible, [np.arange(len(visible))]),
        ]
    return [
        _comparison("llcm/visible_to_infrared", visible, infrared, _one_image_each(infrared), same_camera=True),
        _comparison("llcm/infrared_to_visible", infrared, visible, _one_image_each(visible), same_camera=True),
    ]


# ---- SYSU-MM01 ----


def load_permutation(path: str | os.PathLike) -> list[list[np.ndarray]]:
    """Read SYSU-MM01's `rand_perm_cam.mat`: `result[camera - 1][identity - 1]` is uint8[10, n].

    Row t is a permutation of 1…n, the order in which trial t takes that identity's n images of that camera.
    Raises UserError, naming the file, for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected SYSU-MM01's exp/rand_perm_cam.mat")
    try:
        cell = scipy.io.loadmat(path, variable_names=["rand_perm_cam"])["rand_perm_cam"]
    except Exception as error:  # scipy raises many kinds
        raise UserError(f"{path}: no readable MATLAB file with a variable rand_perm_cam ({error!r})") from error
    if cell.dtype.kind != "O" or cell.size != 6:
        raise UserError(f"{path}: rand_perm_cam must be a 6x1 cell, one for each camera, got {cell.dtype}{cell.shape}")
    permutation = []
    for camera, identities in enumerate(cell.ravel(), start=1):
        if not (isinstance(identities, np.ndarray) and identities.dtype.kind == "O"):
            raise UserError(f"{path}: rand_perm_cam{{{camera}}} must be a cell with one matrix for each identity")
        rows = list(identities.ravel())
        for pid, matrix in enumerate(rows, start=1):
            if matrix.size == 0:
                rows[pid - 1] = np.empty((NUM_TRIALS, 0), np.uint8)
            elif matrix.ndim != 2 or len(matrix) != NUM_TRIALS or not _are_permutations(matrix):
                raise UserError(
                    f"{path}: rand_perm_cam{{{camera}}}{{{pid}}} must be {NUM_TRIALS}xn, "
                    f"each row a permutation of 1 to n, got {matrix.dtype}{list(matrix.shape)}"
                )
        permutation.append(rows)
    return permutation


def _are_permutations(matrix: np.ndarray) -> bool:
    return bool((np.sort(matrix, axis=1) == np.arange(1, matrix.shape[1] + 1)).all())


_SYSU_PATH = re.compile(r"(?:^|[/\\])cam(\d+)[/\\](\d+)[/\\](\d+)(?:\.\w+)?$")


def _sysu_image_numbers(embeddings: Embeddings) -> np.ndarray:
    """Parse 'cam1/0007/0003.jpg' to 3 and check that camids and pids say camera 1, identity 7."""
    numbers = np.empty(len(embeddings), np.int64)
    for row, path in enumerate(embeddings.paths):
        match = _SYSU_PATH.search(str(path))
        if match is None:
            raise UserError(
                f"{embeddings.source}: paths[{row}] is {str(path)!r}; the last three parts of a SYSU-MM01 path "
                "must name camera, identity and image, as in cam1/0007/0003.jpg"
            )
        camera, pid, numbers[row] = map(int, match.groups())
        for name, stored, named in (("camids", embeddings.camids, camera), ("pids", embeddings.pids, pid)):
            if stored[row] != named:
                raise UserError(
                    f"{embeddings.source}: {name}[{row}] is {stored[row]}, but {path} names {named}; "
                    f"store {name} as the data set numbers them"
                )
    return numbers


def _images_by_identity_and_camera(embeddings: Embeddings, order: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """{(pid, camid): rows in ascending `order`}, the keys in ascending order."""
    ranked = np.lexsort((order, embeddings.camids, embeddings.pids))
    keys = np.stack([embeddings.pids[ranked], embeddings.camids[ranked]], axis=1)
    starts = np.flatnonzero(np.any(np.diff(keys, axis=0, prepend=keys[:1] - 1) != 0, axis=1))
    return {
        (int(pid), int(camid)): rows
        for (pid, camid), rows in zip(keys[starts], np.split(ranked, starts[1:]), strict=True)
    }


def _sysu(query: Embeddings, gallery: Embeddings, permutation: list | None, permutation_path: str) -> Comparison:
    for embeddings, cameras, what in (
        (query, SYSU_QUERY_CAMERAS, "queries come from the infrared cameras 3 and 6"),
        (gallery, SYSU_GALLERY_CAMERAS["all"], "the gallery from the visible cameras 1, 2, 4 and 5"),
    ):
        others = sorted(set(embeddings.camids.tolist()) - set(cameras))
        if others:
            raise UserError(f"{embeddings.source}: has images of camera {others[0]}; SYSU-MM01's {what}")
    _sysu_image_numbers(query)
    images = _images_by_identity_and_camera(gallery, _sysu_image_numbers(gallery))
    if permutation is not None:
        pids = sorted(set(query.pids.tolist()) | set(gallery.pids.tolist()))
        _check_against_permutation(images, gallery, pids, permutation, permutation_path)
    settings = []
    for mode, cameras in SYSU_GALLERY_CAMERAS.items():
        for shots, number in (("single", 1), ("multi", MULTI_SHOT)):
            galleries = []
            for trial in range(NUM_TRIALS):
                # As in the programs that draw their own gallery: Python's generator, seeded with the trial.
                generator = random.Random(trial)
                chosen = []
                for (pid, camera), rows in images.items():
                    if camera not in cameras:
                        continue
                    if permutation is not None:
                        chosen.extend(rows[permutation[camera - 1][pid - 1][trial, :number].astype(int) - 1])
                    elif number == 1:
                        chosen.append(generator.choice(rows))
                    else:
                        chosen.extend(generator.sample(rows.tolist(), min(number, len(rows))))
                galleries.append(np.sort(np.asarray(chosen, np.int64)))
            settings.append(Setting(f"sysu/{mode}/{shots}", galleries))
    rooms = [np.array([SYSU_ROOMS.get(camera, camera) for camera in e.camids.tolist()]) for e in (query, gallery)]
    return Comparison(query, gallery, settings, *rooms)


def _check_against_permutation(
    images: dict, gallery: Embeddings, pids: list[int], permutation: list, permutation_path: str
) -> None:
    """Refuse a gallery that is not the whole test set which the permutation was drawn for."""
    numbers = _sysu_image_numbers(gallery)
    for camera in SYSU_GALLERY_CAMERAS["all"]:
        matrices = permutation[camera - 1]
        for pid in pids:
            expected = matrices[pid - 1].shape[1] if 1 <= pid <= len(matrices) else 0
            rows = images.get((pid, camera), np.empty(0, np.int64))
            if len(rows) != expected:
                raise UserError(
                    f"{gallery.source}: {len(rows)} images of identity {pid}, camera {camera}, but {permutation_path} "
                    f"permutes {expected}; embed every image of the test identities, and use that data set's own file"
                )
            if not np.array_equal(numbers[rows], np.arange(1, expected + 1)):
                raise UserError(
                    f"{gallery.source}: the images of identity {pid}, camera {camera} are not numbered 1 to {expected} "
                    f"once each, which {permutation_path} expects"
                )


# ---- RegDB and LLCM ----

_VISIBLE_PARTS, _INFRARED_PARTS = {"visible", "test_vis"}, {"thermal", "test_nir"}


def _visible_and_infrared(first: Embeddings, second: Embeddings) -> tuple[Embeddings, Embeddings]:
    """Order two sets as (visible, infrared) by a folder in their paths; by position where the paths do not say."""
    modalities = []
    for embeddings in (first, second):
        parts = [set(re.split(r"[/\\]", str(path).lower())) for path in embeddings.paths]
        visible = sum(bool(p & _VISIBLE_PARTS) for p in parts)
        infrared = sum(bool(p & _INFRARED_PARTS) for p in parts)
        if visible and infrared:
            raise UserError(f"{embeddings.source}: holds visible and infrared images; expected one modality a file")
        modalities.append("visible" if visible else "infrared" if infrared else None)
    if modalities[0] is not None and modalities[0] == modalities[1]:
        raise UserError(f"{first.source} and {second.source} are both {modalities[0]}; expected one of each modality")
    if modalities == [None, None]:
        warnings.warn(
            f"the paths do not tell the modalities apart (no folder Visible, Thermal, test_vis or test_nir): "
            f"{first.source} is taken as visible, {second.source} as infrared",
            stacklevel=2,
        )
    if modalities[0] == "infrared" or modalities[1] == "visible":
        return second, first
    return first, second


def _one_image_each(embeddings: Embeddings) -> list[np.ndarray]:
    """Ten galleries with one image of each identity and camera; trial t draws with Python's generator seeded with t."""
    paths = np.array([str(path).replace("\\", "/") for path in embeddings.paths])
    images = _images_by_identity_and_camera(embeddings, np.unique(paths, return_inverse=True)[1])
    galleries = []
    for trial in range(NUM_TRIALS):
        generator = random.Random(trial)
        galleries.append(np.sort([generator.choice(rows) for rows in images.values()]))
    return galleries


def _comparison(
    name: str, query: Embeddings, gallery: Embeddings, galleries: list[np.ndarray], same_camera: bool = False
) -> Comparison:
    if not same_camera:
        return Comparison(
            query, gallery, [Setting(name, galleries)], np.zeros(len(query), int), np.ones(len(gallery), int)
        )
    pairs = np.stack([np.concatenate([query.pids, gallery.pids]), np.concatenate([query.camids, gallery.camids])], 1)
    groups = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    return Comparison(query, gallery, [Setting(name, galleries)], groups[: len(query)], groups[len(query) :])
