"""The tfds builder that all data sets share: one layout of records, one order, and an index file for quick starts.

The shards are written in the order of `list_images` (`tfds.core.ShardBasedBuilder`). The usual `GeneratorBasedBuilder`
shuffles through temporary files, which need TensorFlow if a split is larger than 1 GB.
"""

import functools
import hashlib
import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from mpanet_jax.datasets.dataset import SPLITS, Dataset
from mpanet_jax.datasets.raw import raise_fault, read_encoded
from mpanet_jax.datasets.registry import DATASETS
from mpanet_jax.datasets.schema import MODALITY_NAMES, ImageRecord
from mpanet_jax.datasets.tfds_workarounds import LocalInfo, SilentDownloads

IMAGES_PER_SHARD = 2048  # tfds holds the images of a shard in memory while it writes it
VERSION = "1.0.0"

Track = Callable[[Iterable, str, int], Iterable]  # (items, description, total) → the same items; see `progress.track`


def no_progress(items: Iterable, description: str, total: int) -> Iterable:
    """The `Track` that shows nothing: returns the items."""
    del description, total
    return items


class RawDatasetBuilder(SilentDownloads, tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes the images that a data set's `list_images` lists as tfds records, and an index of their metadata.

    A record holds `image` (the file's bytes; BMP becomes lossless PNG), `pid`, `camid`, `modality` and `path`. The
    index, index_{train,test}.npz, holds the arrays pids, camids, modality, paths and parts, pid_names if the data set
    has names, and a fingerprint of everything, images included.

    Attributes:
      dataset_class: the data set's class.
      dataset: the data set, or the variant of it that the tfds config names.
      track: shows a progress bar.
    """

    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The data sets are licensed: ask their authors, then point manual_dir at the folder."

    dataset_class: ClassVar[type[Dataset]]
    track: Track = staticmethod(no_progress)

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)
        variants = self.dataset_class.variants()
        settings = (
            variants[self.builder_config.name]
            if self.builder_config
            else self.dataset_class.settings_class(name=self.dataset_class.name)
        )
        self.dataset = self.dataset_class(settings)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "pid": np.int32,
                "camid": np.int32,
                "modality": tfds.features.ClassLabel(names=list(MODALITY_NAMES.values())),
                "path": tfds.features.Text(),
            }
        )
        return LocalInfo(
            builder=self, description=self.dataset_class.__doc__, features=features, disable_shuffling=True
        )

    def _shard_iterators_per_split(self, dl_manager):
        source = Path(dl_manager.manual_dir)
        for companion in self.dataset.companions:
            if not (source / companion).is_file():
                raise_fault(f"{source / companion}: file missing; evaluation needs it: copy it from the data set")
        self._indices = {split: _Index(self.dataset.list_images(source, split)) for split in SPLITS}
        self._companion_paths = [source / companion for companion in self.dataset.companions]
        # One iterator for all shards, so that there is one progress bar: tfds writes the shards one after the other.
        records = [record for index in self._indices.values() for record in index.records]
        self._records = iter(self.track(records, f"writing {self.info.full_name}", len(records)))
        return {
            split: [
                partial(_examples, source, itertools.islice(self._records, count), index.digest)
                for count in _shard_lengths(len(index.records))
            ]
            for split, index in self._indices.items()
        }

    def _download_and_prepare(self, dl_manager, download_config=None):
        """Writes shards, indices and companions into a folder that tfds moves into place once it is whole."""
        super()._download_and_prepare(dl_manager, download_config)
        next(self._records, None)  # all records are written; this ends the progress bar
        for split, index in self._indices.items():
            index.save(Path(self.data_dir) / f"index_{split}.npz")
        for path in self._companion_paths:
            shutil.copyfile(path, Path(self.data_dir) / path.name)


class _Index:
    def __init__(self, records: list[ImageRecord]):
        self.records = records
        self.digest = hashlib.sha256()

    def save(self, path: Path) -> None:
        names: dict[str, Any] = {"pid_names": np.array([r.pid_name for r in self.records], np.str_)}
        np.savez(
            path,
            **(names if any(r.pid_name for r in self.records) else {}),
            parts=np.array([r.part for r in self.records], np.str_),
            pids=np.array([r.pid for r in self.records], np.int32),
            camids=np.array([r.camid for r in self.records], np.int32),
            modality=np.array([r.modality for r in self.records], np.int32),
            paths=np.array([r.path for r in self.records], np.str_),
            fingerprint=np.array(self.digest.hexdigest()[:32]),
        )


def _shard_lengths(num_images: int) -> list[int]:
    if not num_images:
        raise_fault("a split without images; check the raw folder: python scripts/prepare_data.py … --check")
    full, rest = divmod(num_images, IMAGES_PER_SHARD)
    return [IMAGES_PER_SHARD] * full + [rest] * (rest > 0)


def _examples(source: Path, records: Iterable[ImageRecord], digest) -> Iterator[tuple[str, dict]]:
    for record in records:
        encoded = read_encoded(source / record.path)
        if record.pid_name:
            digest.update(f"{record.pid_name}\0{record.part}\0".encode())
        digest.update(f"{record.path}\0{record.pid}\0{record.camid}\0{record.modality}\0{len(encoded)}\0".encode())
        digest.update(encoded)
        yield (
            record.path,
            {
                "image": io.BytesIO(encoded),
                "pid": record.pid,
                "camid": record.camid,
                "modality": record.modality,
                "path": record.path,
            },
        )


@functools.cache
def builder_class(dataset: type[Dataset]) -> type[RawDatasetBuilder]:
    """Makes a data set's builder class, which registers the data set's name for `tfds.builder`."""
    attributes = {
        "__module__": __name__,
        "__doc__": dataset.__doc__,
        "name": dataset.name,
        "dataset_class": dataset,
        "BUILDER_CONFIGS": [
            tfds.core.BuilderConfig(name=variant, version=VERSION, description=f"{dataset(settings).title}.")
            for variant, settings in dataset.variants().items()
        ],
    }
    builder = type(f"{dataset.__name__}Builder", (RawDatasetBuilder,), attributes)
    # Worker processes get data sources by pickle, which looks a class up in its module.
    globals()[builder.__name__] = builder
    return builder


for _dataset in DATASETS.values():
    builder_class(_dataset)
