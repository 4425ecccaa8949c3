"""SYSU-MM01: six cameras, two of them infrared, 491 identities (Wu et al., ICCV 2017).

On disk: `cam{1..6}/{id:04d}/{n:04d}.jpg`, `exp/{train,val,test}_id.txt` (one comma-separated line each) and
`exp/rand_perm_cam.mat`, the random gallery of the ten test trials.
"""

from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
import scipy.io

from mpanet_jax.datasets.builder import RawDatasetBuilder
from mpanet_jax.datasets.raw import Report, image_names, raise_fault, read_identities
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord

CAMERA_MODALITY = {1: VISIBLE, 2: VISIBLE, 3: INFRARED, 4: VISIBLE, 5: VISIBLE, 6: INFRARED}
IDENTITY_LISTS = {"train": ("exp/train_id.txt", "exp/val_id.txt"), "test": ("exp/test_id.txt",)}
PERMUTATION = "exp/rand_perm_cam.mat"
NUM_TRIALS = 10

# identities, visible images, infrared images
PUBLISHED = {"train": (395, 22258, 11909), "test": (96, 6775, 3803)}


def list_images(source: Path, split: str, *, trial: int = 1, report: Report = raise_fault) -> list[ImageRecord]:
    """The images of `split`, ordered by identity, camera and file name; all six cameras.

    `train` is the identities of train_id.txt and val_id.txt together (395), `test` those of test_id.txt (96).
    `trial` is not used: there is one split. Faults go to `report`, which raises `UserError` by default.
    """
    del trial
    source = Path(source)
    cameras = []
    for camid in CAMERA_MODALITY:
        if (source / f"cam{camid}").is_dir():
            cameras.append(camid)
        else:
            report(f"{source / f'cam{camid}'}: camera folder missing; unpack all six cameras of SYSU-MM01 there")
    listed: dict[int, str] = {}
    for name in IDENTITY_LISTS[split]:
        for pid in read_identities(source / name, report):
            if pid in listed:
                report(f"{source / name}: identity {pid} is in {listed[pid]} too; remove one of the two")
            listed.setdefault(pid, name)
    images = []
    for pid, name in sorted(listed.items()):
        found = [
            ImageRecord(f"cam{camid}/{pid:04d}/{image}", pid, camid, CAMERA_MODALITY[camid])
            for camid in cameras
            for image in image_names(source / f"cam{camid}" / f"{pid:04d}")
        ]
        if not found:
            report(f"{source / name}: identity {pid} has no images (cam*/{pid:04d}); restore them or remove it")
        images += found
    return images


def check_source(source: Path, images: dict[str, list[ImageRecord]], report: Report) -> None:
    """Report what the file lists cannot show: `exp/rand_perm_cam.mat` missing or for other images than the test set's.

    Row t of a camera's and identity's cell must be a permutation of 1..n, n the number of images there, which are named
    by these numbers.
    """
    source = Path(source)
    path = source / PERMUTATION
    if not path.is_file():
        report(f"{path}: file missing; the test protocol draws its galleries by it: copy it from the data set")
        return
    try:
        permutations = read_permutations(path)
    except Exception as error:
        # scipy raises many types for a file that is not MATLAB's, and other contents fail in indexing.
        report(f"{path}: not a MATLAB 5 file with 6x1 cells 'rand_perm_cam' ({type(error).__name__}); copy it again")
        return
    stems = defaultdict(list)
    for image in images["test"]:
        stems[image.camid, image.pid].append(PurePosixPath(image.path).stem)
    test_pids = sorted({image.pid for image in images["test"]})
    for camid in CAMERA_MODALITY:
        if not (source / f"cam{camid}").is_dir():
            continue  # reported once, as the missing folder that it is
        for pid in test_pids:
            folder, names = f"cam{camid}/{pid:04d}", stems[camid, pid]
            num_images = len(names)
            misnamed = [
                name for name in names if not (name.isascii() and name.isdigit() and 0 < int(name) <= num_images)
            ]
            rows = permutations.get((camid, pid), np.empty((NUM_TRIALS, 0)))
            if rows.shape[1] != num_images:
                report(
                    f"{path}: it permutes {rows.shape[1]} images of {folder}, which has {num_images}; "
                    "restore the images or copy the file that belongs to them"
                )
            elif num_images and rows.shape[0] != NUM_TRIALS:
                report(f"{path}: {rows.shape[0]} trials for {folder}, expected {NUM_TRIALS}; copy the file again")
            elif misnamed or len(set(map(int, names))) != num_images:
                report(
                    f"{source / folder}: its images must be named by the numbers 1 to {num_images}, as {path.name} "
                    f"refers to them, each once; found '{(misnamed or names)[0]}': restore the names"
                )
            elif not (np.sort(rows, axis=1) == np.arange(1, num_images + 1)).all():
                report(f"{path}: a row for {folder} is not a permutation of 1..{num_images}; copy the file again")


def read_permutations(path: Path) -> dict[tuple[int, int], np.ndarray]:
    """`rand_perm_cam.mat` as {(camid, pid): uint8[10 trials, n]}; row t permutes 1..n, the images of pid in camid."""
    cameras = scipy.io.loadmat(path)["rand_perm_cam"]
    return {
        (camid, pid): np.atleast_2d(cell[0])
        for camid in CAMERA_MODALITY
        for pid, cell in enumerate(cameras[camid - 1, 0], start=1)
    }


class SysuMm01(RawDatasetBuilder):
    """SYSU-MM01: visible-infrared person re-identification, cameras 1 2 4 5 visible, 3 and 6 infrared."""

    name = "sysu_mm01"
    companions = (PERMUTATION,)

    def list_images(self, source: Path, split: str) -> list[ImageRecord]:
        return list_images(source, split)
