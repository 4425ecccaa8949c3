"""LLCM: nine cameras in low light, 1,064 identities (Zhang and Wang, CVPR 2023).

On disk: `idx/train_vis.txt` and `idx/train_nir.txt` with lines `path label`, where a path ends in
`{id:04d}/{id:04d}_c{camera:02d}_….jpg`; `idx/test_id.txt` (one comma-separated line);
`test_vis/cam{1..9}/{id:04d}/*` and `test_nir/cam{1,2,4..9}/{id:04d}/*`.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from mpanet_jax.datasets.dataset import Dataset, Evaluation, rows_of
from mpanet_jax.datasets.raw import (
    Report,
    check_labels,
    image_names,
    is_number,
    raise_fault,
    read_identities,
    read_index,
)
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord, Split
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.protocol import (
    Comparison,
    Protocol,
    Setting,
    both_directions,
    compare_across_cameras,
    one_image_each,
    visible_and_infrared,
)

CAMERAS = {VISIBLE: tuple(range(1, 10)), INFRARED: (1, 2, 4, 5, 6, 7, 8, 9)}  # camera 3 has visible images only
WORDS = {VISIBLE: "vis", INFRARED: "nir"}  # in the names of index files and folders
TEST_LIST = "idx/test_id.txt"

_CAMERA = re.compile(r"_c(?:am)?0*(\d{1,9})_|(?:^|/)cam0*(\d{1,9})/")


@dataclass(frozen=True)
class LlcmProtocol(Protocol):
    """Both directions; ten galleries of one image of each identity and camera.

    A query meets no image of its own identity and camera.
    """

    name = "llcm"

    def comparisons(self, query: Embeddings, gallery: Embeddings) -> list[Comparison]:
        # Only camera 3 tells the modality.
        visible, infrared = visible_and_infrared(query, gallery, {3: VISIBLE})
        return [
            compare_across_cameras(one, other, [Setting(f"llcm/{direction}", one_image_each(other))])
            for direction, one, other in both_directions(visible, infrared)
        ]


class Llcm(Dataset):
    """LLCM: visible and near-infrared images of 1,064 people from nine cameras in low light."""

    name = "llcm"
    licence = "LLCM is for research; its authors give it out on a signed agreement: https://github.com/ZYK100/LLCM"
    published = MappingProxyType({"train": (713, 16946, 13975), "test": (351, 8680, 7166)})
    protocols = (LlcmProtocol,)
    camera_folders = MappingProxyType(
        {f"test_{WORDS[modality]}/cam{camid}": (camid, modality) for modality in CAMERAS for camid in CAMERAS[modality]}
    )

    def list_images(self, source: Path, split: str, report: Report = raise_fault) -> list[ImageRecord]:
        """The images of a split, ordered by identity, camera, modality and path; see `Dataset.list_images`."""
        images = (_train_images if split == "train" else _test_images)(Path(source), report)
        return sorted(images, key=lambda image: (image.pid, image.camid, image.modality, image.path))

    def evaluations(self, split: Split, directory: Path) -> list[Evaluation]:
        return [Evaluation(rows_of(split, VISIBLE), rows_of(split, INFRARED), LlcmProtocol())]


def _train_images(source: Path, report: Report) -> list[ImageRecord]:
    images = []
    for modality, word in WORDS.items():
        index = source / "idx" / f"train_{word}.txt"
        pid_labels = []
        for path, label in read_index(index, source, report):
            folder, camera = PurePosixPath(path).parent.name, _CAMERA.search(path)
            if not is_number(folder) or camera is None:
                report(f"{index}: '{path}' is not of the form 'identity/identity_cCAMERA_name.jpg'; correct the line")
                continue
            images.append(ImageRecord(path, int(folder), int(camera[1] or camera[2]), modality))
            pid_labels.append((int(folder), label))
        check_labels(index, pid_labels, report)
    return images


def _test_images(source: Path, report: Report) -> list[ImageRecord]:
    for folder, (_, modality) in Llcm.camera_folders.items():
        if not (source / folder).is_dir():
            report(f"{source / folder}: camera folder missing; unpack LLCM's test_{WORDS[modality]} folder there")
    images = []
    for pid in read_identities(source / TEST_LIST, report):
        found = [
            ImageRecord(f"{folder}/{pid:04d}/{image}", pid, camid, modality)
            for folder, (camid, modality) in Llcm.camera_folders.items()
            for image in image_names(source / folder / f"{pid:04d}")
        ]
        if not found:
            report(f"{source / TEST_LIST}: identity {pid} has no images (test_*/cam*/{pid:04d}); restore or remove it")
        images += found
    return images
