"""RegDB: 412 identities, ten visible and ten thermal images each, ten random splits (Nguyen et al., Sensors 2017).

On disk: `Visible/{id}/*.bmp`, `Thermal/{id}/*.bmp` and `idx/{train,test}_{visible,thermal}_{1..10}.txt` with lines
like `Visible/285/name.bmp 0`. The number after the path is the identity's label within the file. Here an identity's
number is that of its folder, which is the same in all splits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from mpanet_jax.datasets.dataset import Dataset, Evaluation, rows_of
from mpanet_jax.datasets.raw import Report, check_labels, is_number, raise_fault, read_index
from mpanet_jax.datasets.schema import INFRARED, VISIBLE, ImageRecord, Split
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.protocol import (
    Comparison,
    Protocol,
    Setting,
    both_directions,
    compare_all,
    everything,
    visible_and_infrared,
)
from mpanet_jax.settings import DatasetSettings
from mpanet_jax.settings_base import between, one_of, setting

TRIALS = range(1, 11)
CAMERAS = {1: VISIBLE, 2: INFRARED}


@dataclass(frozen=True)
class RegdbSettings(DatasetSettings):
    """The settings of RegDB: the common ones and `trial`."""

    name: str = setting("regdb", "the data set", one_of("regdb"))
    trial: int = setting(1, "which of the ten splits", between(TRIALS[0], TRIALS[-1]))


@dataclass(frozen=True)
class RegdbProtocol(Protocol):
    """Both directions, all images of one modality against all of the other."""

    name = "regdb"
    metric = "euclidean"

    def comparisons(self, query: Embeddings, gallery: Embeddings) -> list[Comparison]:
        return [
            compare_all(one, other, [Setting(f"regdb/{direction}", everything(other))])
            for direction, one, other in both_directions(*visible_and_infrared(query, gallery, CAMERAS))
        ]


class Regdb(Dataset):
    """RegDB: visible and thermal images of 412 people; one variant for each of the ten random splits."""

    name = "regdb"
    licence = "RegDB is for research; its authors give it out on a signed agreement: http://dm.dgu.edu/link.html"
    settings_class = RegdbSettings
    published = MappingProxyType({"train": (206, 2060, 2060), "test": (206, 2060, 2060)})
    protocols = (RegdbProtocol,)
    camera_folders = MappingProxyType({"Visible": (1, VISIBLE), "Thermal": (2, INFRARED)})

    @classmethod
    def variants(cls) -> Mapping[str, DatasetSettings]:
        return {f"split_{trial}": RegdbSettings(trial=trial) for trial in TRIALS}

    @property
    def variant(self) -> str:
        return f"split_{self.settings.trial}"

    @property
    def title(self) -> str:
        return f"{self.name} trial {self.settings.trial}"

    @property
    def options(self) -> str:
        return f" --trial {self.settings.trial}"

    def list_images(self, source: Path, split: str, report: Report = raise_fault) -> list[ImageRecord]:
        """The images of a split of the trial, ordered by identity, camera and path; see `Dataset.list_images`."""
        source = Path(source)
        images = []
        for folder, (camid, modality) in self.camera_folders.items():
            if not (source / folder).is_dir():
                report(f"{source / folder}: folder missing; unpack RegDB's {folder} folder there")
                continue
            index = source / "idx" / f"{split}_{folder.lower()}_{self.settings.trial}.txt"
            pid_labels = []
            for path, label in read_index(index, source, report):
                parts = PurePosixPath(path).parts
                if len(parts) != 3 or parts[0] != folder or not is_number(parts[1]):
                    report(f"{index}: '{path}' is not of the form '{folder}/identity/name.bmp'; correct the line")
                    continue
                images.append(ImageRecord(path, int(parts[1]), camid, modality))
                pid_labels.append((int(parts[1]), label))
            check_labels(index, pid_labels, report)
        return sorted(images, key=lambda image: (image.pid, image.camid, image.path))

    def evaluations(self, split: Split, directory: Path) -> list[Evaluation]:
        return [Evaluation(rows_of(split, VISIBLE), rows_of(split, INFRARED), RegdbProtocol())]
