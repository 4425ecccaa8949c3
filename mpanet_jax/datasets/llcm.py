"""LLCM: nine cameras in low light, 1,064 identities (Zhang and Wang, CVPR 2023).

On disk: `idx/train_vis.txt` and `idx/train_nir.txt` with lines `path label`, where a path ends in
`{id:04d}/{id:04d}_c{camera:02d}_….jpg`; `idx/test_id.txt` (one comma-separated line);
`test_vis/cam{1..9}/{id:04d}/*` and `test_nir/cam{1,2,4..9}/{id:04d}/*`.
"""

import re
from pathlib import Path, PurePosixPath

from mpanet_jax.datasets.builder import RawDatasetBuilder
from mpanet_jax.datasets.raw import Report, check_labels, image_names, raise_fault, read_identities, read_index
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord

# The word of index files and folders, the modality, the cameras.
MODALITIES = (("vis", VISIBLE, tuple(range(1, 10))), ("nir", INFRARED, (1, 2, 4, 5, 6, 7, 8, 9)))
TEST_LIST = "idx/test_id.txt"

# identities, visible images, infrared images
PUBLISHED = {"train": (713, 16946, 13975), "test": (351, 8680, 7166)}

_CAMERA = re.compile(r"_c(?:am)?0*(\d+)_|(?:^|/)cam0*(\d+)/")


def list_images(source: Path, split: str, *, trial: int = 1, report: Report = raise_fault) -> list[ImageRecord]:
    """The images of `split`, ordered by identity, camera and file name; `test` is test_vis and test_nir together.

    `trial` is not used: there is one split. Faults go to `report`, which raises `UserError` by default.
    """
    del trial
    images = (_train_images if split == "train" else _test_images)(Path(source), report)
    return sorted(images, key=lambda image: (image.pid, image.camid, image.modality, image.path))


def _train_images(source: Path, report: Report) -> list[ImageRecord]:
    images = []
    for word, modality, _ in MODALITIES:
        index = source / "idx" / f"train_{word}.txt"
        pid_labels = []
        for path, label in read_index(index, source, report):
            folder, camera = PurePosixPath(path).parent.name, _CAMERA.search(path)
            if not folder.isdigit() or camera is None:
                report(f"{index}: '{path}' is not of the form 'identity/identity_cCAMERA_name.jpg'; correct the line")
                continue
            images.append(ImageRecord(path, int(folder), int(camera[1] or camera[2]), modality))
            pid_labels.append((int(folder), label))
        check_labels(index, pid_labels, report)
    return images


def _test_images(source: Path, report: Report) -> list[ImageRecord]:
    cameras = []
    for word, modality, camids in MODALITIES:
        for camid in camids:
            folder = f"test_{word}/cam{camid}"
            if (source / folder).is_dir():
                cameras.append((folder, camid, modality))
            else:
                report(f"{source / folder}: camera folder missing; unpack LLCM's test_{word} folder there")
    images = []
    for pid in read_identities(source / TEST_LIST, report):
        found = [
            ImageRecord(f"{folder}/{pid:04d}/{image}", pid, camid, modality)
            for folder, camid, modality in cameras
            for image in image_names(source / folder / f"{pid:04d}")
        ]
        if not found:
            report(f"{source / TEST_LIST}: identity {pid} has no images (test_*/cam*/{pid:04d}); restore or remove it")
        images += found
    return images


def check_source(source: Path, images: dict[str, list[ImageRecord]], report: Report) -> None:
    """LLCM has nothing beside its lists to check."""


class Llcm(RawDatasetBuilder):
    """LLCM: visible and near-infrared images of 1,064 people from nine cameras in low light."""

    name = "llcm"

    def list_images(self, source: Path, split: str) -> list[ImageRecord]:
        return list_images(source, split)
