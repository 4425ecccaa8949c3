"""What a data set is: one class in one file, with everything that this program knows of it."""

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
Images = Mapping[str, list[ImageRecord]]  # of each of the SPLITS


@dataclass(frozen=True)
class Evaluation:
    """One test on a split: the rows of its queries and of its gallery, and the protocol that compares them."""

    query: Int[np.ndarray, " q"]
    gallery: Int[np.ndarray, " g"]
    protocol: Protocol


class Dataset:
    """A data set, or one variant of it (RegDB: one of its ten splits), as the settings say.

    Attributes:
      name: what settings, commands and tfds call it.
      settings_class: of its settings; its own where it has fields of its own.
      published: {split: (identities, visible images, infrared images)}; empty where nobody published any.
      companions: files of the raw folder that are kept with the prepared data.
      protocols: its protocols' classes.
      licence: what its authors ask of those who use it, in a sentence that names its page; model cards say it.
      has_validation: whether a part 'val' of the training split is there to choose by.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[DatasetSettings]] = DatasetSettings
    published: ClassVar[Mapping[str, tuple[int, int, int]]] = MappingProxyType({})
    companions: ClassVar[tuple[str, ...]] = ()
    protocols: ClassVar[tuple[type[Protocol], ...]] = ()
    licence: ClassVar[str] = "Nothing is known here of what the owner of the images allows; ask them."
    has_validation: ClassVar[bool] = False

    def __init__(self, settings: DatasetSettings):
        self.settings = settings

    @classmethod
    def variants(cls) -> Mapping[str, DatasetSettings]:
        """{'split_3': settings}, tfds's configurations; empty where there is one data set only."""
        return {}

    @property
    def variant(self) -> str:
        """The key of `variants` that the settings are of, or ''."""
        return ""

    @property
    def title(self) -> str:
        """What messages call it: 'regdb trial 3'."""
        return self.name

    @property
    def options(self) -> str:
        """The flags of prepare_data.py that name this variant: ' --trial 3'."""
        return ""

    def list_images(self, source: Path, split: str, report: Report = raise_fault) -> list[ImageRecord]:
        """The images of `split` ('train' or 'test') in a fixed order. Faults of the lists go to `report`."""
        raise NotImplementedError

    def check_source(self, source: Path, images: Images, report: Report) -> None:
        """Report what the lists of images cannot show."""

    def check_identities(self, source: Path, images: Images, report: Report) -> None:
        """Report identities of both splits, and training identities that one modality lacks."""
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
        """What is unusual but no fault: other counts than the published ones."""
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
        """The tests on the test split, whose prepared data lie in `directory`."""
        raise NotImplementedError

    def validations(self, split: Split) -> list[Evaluation]:
        """The tests on the part 'val' of the training split."""
        raise NotImplementedError

    @classmethod
    def record_of_path(cls, path: str) -> ImageRecord | None:
        """What the raw folders' layout says of an image at `path`, its parts between '/'; None for any other path."""
        return None


def rows_of(split: Split, modality: int) -> Int[np.ndarray, " n"]:
    """The images of a split in one modality."""
    return np.flatnonzero(split.modality == modality)
