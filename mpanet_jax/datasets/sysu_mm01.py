"""SYSU-MM01: six cameras, two of them infrared, 491 identities (Wu et al., ICCV 2017).

On disk: `cam{1..6}/{id:04d}/{n:04d}.jpg`, `exp/{train,val,test}_id.txt` (one comma-separated line each) and
`exp/rand_perm_cam.mat`, the random gallery of the ten test trials.
"""

import os
import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import numpy as np
from jaxtyping import Int

from mpanet_jax.datasets.dataset import Dataset, Evaluation, Images, rows_of
from mpanet_jax.datasets.mat_file import read_variable
from mpanet_jax.datasets.raw import Report, image_names, raise_fault, read_identities
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord, Split
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import UserError
from mpanet_jax.protocol import (
    NUM_TRIALS,
    Comparison,
    Protocol,
    Setting,
    images_by_identity_and_camera,
    known_modality,
)

CAMERAS = {1: VISIBLE, 2: VISIBLE, 3: INFRARED, 4: VISIBLE, 5: VISIBLE, 6: INFRARED}
QUERY_CAMERAS = (3, 6)
GALLERY_CAMERAS = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
ROOMS = {3: 2}  # camera 3 stands in camera 2's room
SHOTS = {"single": 1, "multi": 10}  # gallery images of an identity and camera
IDENTITY_LISTS = {"train": ("train", "val"), "test": ("test",)}  # exp/NAME_id.txt
PERMUTATION = "exp/rand_perm_cam.mat"

Permutation = dict[tuple[int, int], np.ndarray]


# ---- the permutation file ----


def load_permutation(path: str | os.PathLike) -> Permutation:
    """Read SYSU-MM01's `rand_perm_cam.mat`: {(camid, pid): uint8[10 trials, n]}, n ≥ 1.

    Row t is a permutation of 1…n, the order in which trial t takes that identity's n images of that camera.

    Raises:
      UserError: names the file: missing, no MATLAB 5 file, or of other contents.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected SYSU-MM01's exp/rand_perm_cam.mat")
    try:
        cell = read_variable(path, "rand_perm_cam")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: no readable MATLAB 5 file with a variable rand_perm_cam ({error})") from error
    if cell.dtype.kind != "O" or cell.size != len(CAMERAS):
        raise UserError(f"{path}: rand_perm_cam must be a 6x1 cell, one for each camera, got {cell.dtype}{cell.shape}")
    permutation: Permutation = {}
    for camid, identities in enumerate(cell.ravel(), start=1):
        if not (isinstance(identities, np.ndarray) and identities.dtype.kind == "O"):
            raise UserError(f"{path}: rand_perm_cam{{{camid}}} must be a cell with one matrix for each identity")
        for pid, matrix in enumerate(identities.ravel(), start=1):
            if not matrix.size:
                continue
            if matrix.ndim != 2 or len(matrix) != NUM_TRIALS or not _are_permutations(matrix):
                raise UserError(
                    f"{path}: rand_perm_cam{{{camid}}}{{{pid}}} must be {NUM_TRIALS}xn, "
                    f"each row a permutation of 1 to n, got {matrix.dtype}{list(matrix.shape)}"
                )
            permutation[camid, pid] = matrix
    return permutation


def _are_permutations(matrix: np.ndarray) -> bool:
    return bool((np.sort(matrix, axis=1) == np.arange(1, matrix.shape[1] + 1)).all())


def _images_permuted(permutation: Permutation, pid: int, camid: int) -> int:
    return permutation[camid, pid].shape[1] if (camid, pid) in permutation else 0


# ---- the protocols ----

# (the rows of each (pid, camid) in the order of their paths, trial, how many of each at most) → the rows drawn
_Draw = Callable[[dict[tuple[int, int], np.ndarray], int, int], list[int]]


class _SysuMm01Protocol(Protocol):
    def places(self, embeddings: Embeddings) -> Int[np.ndarray, " n"]:
        """The rooms: camera 3 stands in camera 2's."""
        return _rooms(embeddings)


@dataclass(frozen=True)
class SysuMm01Protocol(_SysuMm01Protocol):
    """Queries of cameras 3 and 6; ten galleries of cameras 1 2 4 5 (all) or 1 2 (indoor), by the permutation file.

    The rows of the file refer to the images of an identity and camera in the order of their paths.
    """

    permutation: str | os.PathLike

    name = "sysu_mm01"

    def comparisons(self, query: Embeddings, gallery: Embeddings) -> list[Comparison]:
        permutation = load_permutation(self.permutation)

        def draw(images, trial, number):
            return [
                row
                for camera, rows in images.items()
                for row in rows[permutation[camera[::-1]][trial, :number].astype(int) - 1]
            ]

        _check_cameras(query, gallery)
        _check_complete(query, gallery, permutation, str(self.permutation))
        return [_comparison(query, gallery, draw)]


@dataclass(frozen=True)
class SysuMm01RandomProtocol(_SysuMm01Protocol):
    """The same, with galleries that Python's generator, seeded with the trial, draws from the sorted files."""

    name = "sysu_mm01_random"

    def comparisons(self, query: Embeddings, gallery: Embeddings) -> list[Comparison]:
        def draw(images, trial, number):
            generator, rows_of_each = random.Random(trial), (rows.tolist() for rows in images.values())
            if number == 1:
                return [generator.choice(rows) for rows in rows_of_each]
            return [row for rows in rows_of_each for row in generator.sample(rows, min(number, len(rows)))]

        _check_cameras(query, gallery)
        return [_comparison(query, gallery, draw)]


def _comparison(query: Embeddings, gallery: Embeddings, draw: _Draw) -> Comparison:
    images, settings = images_by_identity_and_camera(gallery), []
    for mode, cameras in GALLERY_CAMERAS.items():
        chosen = {key: rows for key, rows in images.items() if key[1] in cameras}
        for shots, number in SHOTS.items():
            galleries = [np.sort(np.array(draw(chosen, trial, number), np.int64)) for trial in range(NUM_TRIALS)]
            settings.append(Setting(f"sysu/{mode}/{shots}", galleries))
    return Comparison(query, gallery, settings, _rooms(query), _rooms(gallery))


def _rooms(embeddings: Embeddings) -> Int[np.ndarray, " n"]:
    """int[N]: the room that each image's camera stands in."""
    return np.array([ROOMS.get(camid, camid) for camid in embeddings.camids.tolist()])


def _check_cameras(query: Embeddings, gallery: Embeddings) -> None:
    for embeddings, cameras, what in (
        (query, QUERY_CAMERAS, "queries come from the infrared cameras 3 and 6"),
        (gallery, GALLERY_CAMERAS["all"], "the gallery from the visible cameras 1, 2, 4 and 5"),
    ):
        others = sorted(set(embeddings.camids.tolist()) - set(cameras))
        if others:
            raise UserError(f"{embeddings.source}: has images of camera {others[0]}; SYSU-MM01's {what}")
        known_modality(embeddings, CAMERAS)  # refuses a modality that the cameras contradict


def _check_complete(query: Embeddings, gallery: Embeddings, permutation: Permutation, path: str) -> None:
    """Refuse a gallery that is not the whole test set which the permutation was drawn for."""
    images = images_by_identity_and_camera(gallery)
    for camid in GALLERY_CAMERAS["all"]:
        for pid in sorted({*query.pids.tolist(), *gallery.pids.tolist()}):
            here, expected = len(images.get((pid, camid), ())), _images_permuted(permutation, pid, camid)
            if here != expected:
                raise UserError(
                    f"{gallery.source}: {here} images of identity {pid}, camera {camid}, but {path} permutes "
                    f"{expected}; embed every image of the test identities, and use that data set's own file"
                )


# ---- the data set ----


_LAYOUT = re.compile(r"(?:^|/)(cam(?P<camera>[1-6])/(?P<pid>\d{1,18})/[^/]+)$")


class SysuMm01(Dataset):
    """SYSU-MM01: visible-infrared person re-identification, cameras 1 2 4 5 visible, 3 and 6 infrared."""

    name = "sysu_mm01"
    licence = "SYSU-MM01 is for research; its authors give it out on a signed agreement: https://github.com/wuancong/SYSU-MM01"
    published = MappingProxyType({"train": (395, 22258, 11909), "test": (96, 6775, 3803)})
    companions = (PERMUTATION,)
    protocols = (SysuMm01Protocol, SysuMm01RandomProtocol)
    has_validation = True

    def list_images(self, source: Path, split: str, report: Report = raise_fault) -> list[ImageRecord]:
        """The images of `split`, ordered by identity, camera and file name; all six cameras.

        `train` is the identities of train_id.txt and val_id.txt together (395), `test` those of test_id.txt (96).
        """
        source = Path(source)
        cameras = []
        for camid in CAMERAS:
            if (source / f"cam{camid}").is_dir():
                cameras.append(camid)
            else:
                report(f"{source / f'cam{camid}'}: camera folder missing; unpack all six cameras of SYSU-MM01 there")
        listed: dict[int, str] = {}
        for part in IDENTITY_LISTS[split]:
            for pid in read_identities(_list(source, part), report):
                if pid in listed:
                    other = _list(source, listed[pid]).relative_to(source)
                    report(f"{_list(source, part)}: identity {pid} is in {other} too; remove one of the two")
                listed.setdefault(pid, part)
        images = []
        for pid, part in sorted(listed.items()):
            found = [
                ImageRecord(f"cam{camid}/{pid:04d}/{image}", pid, camid, CAMERAS[camid], part)
                for camid in cameras
                for image in image_names(source / f"cam{camid}" / f"{pid:04d}")
            ]
            if not found:
                where = _list(source, part)
                report(f"{where}: identity {pid} has no images (cam*/{pid:04d}); restore them or remove it")
            images += found
        return images

    def check_source(self, source: Path, images: Images, report: Report) -> None:
        """Report `exp/rand_perm_cam.mat` missing, damaged, or for other images than the test set's.

        Row t of a camera's and identity's cell must be a permutation of 1..n, n the number of images there, which are
        named by these numbers.
        """
        path = source / PERMUTATION
        if not path.is_file():
            report(f"{path}: file missing; the test protocol draws its galleries by it: copy it from the data set")
            return
        try:
            permutation = load_permutation(path)
        except UserError as error:
            report(f"{error}; copy the file again")
            return
        stems = defaultdict(list)
        for image in images["test"]:
            stems[image.camid, image.pid].append(PurePosixPath(image.path).stem)
        test_pids = sorted({image.pid for image in images["test"]})
        for camid in CAMERAS:
            if not (source / f"cam{camid}").is_dir():
                continue  # reported once, as the missing folder that it is
            for pid in test_pids:
                folder, names = f"cam{camid}/{pid:04d}", stems[camid, pid]
                permuted = _images_permuted(permutation, pid, camid)
                if permuted != len(names):
                    report(
                        f"{path}: it permutes {permuted} images of {folder}, which has {len(names)}; "
                        "restore the images or copy the file that belongs to them"
                    )
                    continue
                for number, name in enumerate(names, start=1):
                    if not (name.isascii() and name.isdigit() and int(name) == number):
                        report(
                            f"{source / folder}: its images, sorted by name, must be numbered 1 to {len(names)}, as "
                            f"{path.name} refers to them; image {number} is '{name}': restore the names"
                        )
                        break

    def evaluations(self, split: Split, directory: Path) -> list[Evaluation]:
        return self._infrared_against_visible(split, SysuMm01Protocol(directory / PurePosixPath(PERMUTATION).name))

    def validations(self, split: Split) -> list[Evaluation]:
        return self._infrared_against_visible(split, SysuMm01RandomProtocol())

    @staticmethod
    def _infrared_against_visible(split: Split, protocol: Protocol) -> list[Evaluation]:
        return [Evaluation(rows_of(split, INFRARED), rows_of(split, VISIBLE), protocol)]

    @classmethod
    def record_of_path(cls, path: str) -> ImageRecord | None:
        if (match := _LAYOUT.search(path)) is None:
            return None
        camid = int(match["camera"])
        return ImageRecord(match[1], int(match["pid"]), camid, CAMERAS[camid])


def _list(source: Path, part: str) -> Path:
    return source / "exp" / f"{part}_id.txt"
