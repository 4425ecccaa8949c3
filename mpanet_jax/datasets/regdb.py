"""RegDB: 412 identities, ten visible and ten thermal images each, ten random splits (Nguyen et al., Sensors 2017).

On disk: `Visible/{id}/*.bmp`, `Thermal/{id}/*.bmp` and `idx/{train,test}_{visible,thermal}_{1..10}.txt` with lines
like `Visible/285/name.bmp 0`. The number behind the path is the identity's label within its file; an identity's
number here is its folder's, which is the same in every split.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import tensorflow_datasets as tfds

from mpanet_jax.datasets.builder import VERSION, RawDatasetBuilder
from mpanet_jax.datasets.raw import Report, check_labels, raise_fault, read_index
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord
from mpanet_jax.settings import DatasetSettings, between, one_of, setting

TRIALS = range(1, 11)
# The index files' word and the folder of each camera: 1 visible, 2 thermal.
CAMERAS = {1: ("visible", "Visible", VISIBLE), 2: ("thermal", "Thermal", INFRARED)}


@dataclass(frozen=True)
class RegdbSettings(DatasetSettings):
    """RegDB's, with a field of its own."""

    name: str = setting("regdb", "the data set", one_of("regdb"))
    trial: int = setting(1, "which of the ten splits", between(TRIALS[0], TRIALS[-1]))


# identities, visible images, infrared images
PUBLISHED = {"train": (206, 2060, 2060), "test": (206, 2060, 2060)}


def list_images(source: Path, split: str, *, trial: int = 1, report: Report = raise_fault) -> list[ImageRecord]:
    """The images of `split` of trial 1 to 10, ordered by identity, camera and file name.

    Camera 1 is visible, 2 thermal. Faults go to `report`, which raises `UserError` by default.
    """
    source = Path(source)
    images = []
    for camid, (word, folder, modality) in CAMERAS.items():
        if not (source / folder).is_dir():
            report(f"{source / folder}: folder missing; unpack RegDB's {folder} folder there")
            continue
        index = source / "idx" / f"{split}_{word}_{trial}.txt"
        pid_labels = []
        for path, label in read_index(index, source, report):
            parts = PurePosixPath(path).parts
            if len(parts) != 3 or parts[0] != folder or not parts[1].isdigit():
                report(f"{index}: '{path}' is not of the form '{folder}/identity/name.bmp'; correct the line")
                continue
            images.append(ImageRecord(path, int(parts[1]), camid, modality))
            pid_labels.append((int(parts[1]), label))
        check_labels(index, pid_labels, report)
    return sorted(images, key=lambda image: (image.pid, image.camid, image.path))


def check_source(source: Path, images: dict[str, list[ImageRecord]], report: Report) -> None:
    """RegDB has nothing beside its index files to check."""


class Regdb(RawDatasetBuilder):
    """RegDB: visible and thermal images of 412 people; one configuration for each of the ten random splits."""

    name = "regdb"
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name=f"split_{trial}", version=VERSION, description=f"Trial {trial} of ten.")
        for trial in TRIALS
    ]

    def list_images(self, source: Path, split: str) -> list[ImageRecord]:
        assert self.builder_config is not None  # tfds takes one of the above
        return list_images(source, split, trial=int(self.builder_config.name.removeprefix("split_")))
