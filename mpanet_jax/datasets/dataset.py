"""What a data set is: one class in one file, with everything that this program knows about it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from mpanet_jax.datasets.raw import Report, raise_fault
from mpanet_jax.datasets.schema import INFRARED, MODALITY_NAMES, VISIBLE, ImageRecord, Split
from mpanet_jax.protocol import Protocol
from mpanet_jax.settings import DatasetSettings

SPLITS = ("train", "test")
Images = Mapping[str, list[ImageRecord]]  # split → its images


@dataclass(frozen=True)
class Evaluation:
    """One test on a split.

    Attributes:
      query, gallery: the rows of the split that are its queries and its gallery.
      protocol: compares them.
    """

    query: Int[np.ndarray, " q"]
    gallery: Int[np.ndarray, " g"]
    protocol: Protocol


class Dataset:
    """A data set, or one variant of it (RegDB: one of its ten splits), as the settings say.

    Attributes:
      name: what settings, commands and tfds call it.
      settings_class: the class of its settings; a subclass of `DatasetSettings` if it has fields of its own.
      published: {split: (identities, visible images, infrared images)}; empty if nobody has published the counts.
      companions: files of the raw folder that are copied to the prepared data.
      protocols: the classes of its test protocols.
      licence: one sentence that says what its authors ask of users and names its page; model cards repeat it.
      has_validation: whether the training split has a part 'val', by which a checkpoint can be chosen.
      camera_folders: {folder: (camid, modality)}, if the raw images lie in FOLDER/PID/; see `record_of_path`.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[DatasetSettings]] = DatasetSettings
    published: ClassVar[Mapping[str, tuple[int, int, int]]] = MappingProxyType({})
    companions: ClassVar[tuple[str, ...]] = ()
    protocols: ClassVar[tuple[type[Protocol], ...]] = ()
    licence: ClassVar[str] = "Nothing is known here of what the owner of the images allows; ask them."
    has_validation: ClassVar[bool] = False
    camera_folders: ClassVar[Mapping[str, tuple[int, int]]] = MappingProxyType({})

    def __init__(self, settings: DatasetSettings):
        self.settings = settings

    @classmethod
    def variants(cls) -> Mapping[str, DatasetSettings]:
        """The variants, which are tfds's configurations, as {'split_3': settings}; {} if there are none."""
        return {}

    @property
    def variant(self) -> str:
        """The variant that the settings choose, a key of `variants`; '' if there are none."""
        return ""

    @property
    def title(self) -> str:
        """The name in messages: 'regdb trial 3'."""
        return self.name

    @property
    def options(self) -> str:
        """The flags of prepare_data.py that choose this variant: ' --trial 3'."""
        return ""

    def list_images(self, source: Path, split: str, report: Report = raise_fault) -> list[ImageRecord]:
        """Lists the images of a split, in an order that is the same on every machine.

        Args:
          source: the raw folder.
          split: 'train' or 'test'.
          report: told each fault of the lists in one line.
        """
        raise NotImplementedError

    def check_source(self, source: Path, images: Images, report: Report) -> None:
        """Reports faults of the raw folder that its lists of images do not show, such as a missing companion."""

    def check_identities(self, source: Path, images: Images, report: Report) -> None:
        """Reports identities that are in both splits, and training identities without images in one modality."""
        where = self._where(source)
        pids = {split: {image.pid for image in images[split]} for split in SPLITS}
        for pid in sorted(pids["train"] & pids["test"]):
            report(f"{where}: identity {pid} is in both the training and the test lists; remove it from one")
        for modality, other in ((VISIBLE, INFRARED), (INFRARED, VISIBLE)):
            for pid in sorted(pids["train"] - {i.pid for i in images["train"] if i.modality == other}):
                report(
                    f"{where}: training identity {pid} has {MODALITY_NAMES[modality]} images only and training needs "
                    f"both modalities; restore its {MODALITY_NAMES[other]} images or remove it from the training list"
                )

    def warnings(self, source: Path, images: Images) -> list[str]:
        """What is unusual but no fault, a line each: counts that differ from the published ones."""
        found = []
        for split, published in self.published.items():
            counts = (
                len({image.pid for image in images[split]}),
                sum(image.modality == VISIBLE for image in images[split]),
                sum(image.modality == INFRARED for image in images[split]),
            )
            if counts != published:
                found.append(
                    f"{self._where(source)}: {split} has {counts[0]:,} identities, {counts[1]:,} visible and "
                    f"{counts[2]:,} infrared images; published are "
                    f"{published[0]:,}, {published[1]:,} and {published[2]:,}"
                )
        return found

    def _where(self, source: Path) -> str:
        return str(source) + self.title.removeprefix(self.name)

    def evaluations(self, split: Split, directory: Path) -> list[Evaluation]:
        """The tests on the test split; `directory` is the folder of the prepared data, with the companions."""
        raise NotImplementedError

    def validations(self, split: Split) -> list[Evaluation]:
        """The tests on the part 'val' of the training split."""
        raise NotImplementedError

    @classmethod
    def record_of_path(cls, path: str) -> ImageRecord | None:
        """What an image's path says in the layout of this data set; None for a path of another layout.

        Args:
          path: ends in FOLDER/PID/NAME, where FOLDER is one of the `camera_folders`; parts are separated by '/'.
        """
        above, pid, name = f"//{path}".rsplit("/", 2)
        if re.fullmatch(r"\d{1,18}", pid) and name:  # Python refuses to read numbers of thousands of digits
            for folder, (camid, modality) in cls.camera_folders.items():
                if above.endswith(f"/{folder}"):
                    return ImageRecord(f"{folder}/{pid}/{name}", int(pid), camid, modality)
        return None


def rows_of(split: Split, modality: int) -> Int[np.ndarray, " n"]:
    """The rows of a split's images in one modality."""
    return np.flatnonzero(split.modality == modality)
