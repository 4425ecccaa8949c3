"""Prepared data sets: build them once, all or nothing, and open their splits quickly."""

import contextlib
import fcntl
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mpanet_jax.datasets.builder import VERSION, RawDatasetBuilder, Track, builder_class, no_progress
from mpanet_jax.datasets.dataset import SPLITS, Dataset, Evaluation
from mpanet_jax.datasets.registry import make_dataset
from mpanet_jax.datasets.schema import Split
from mpanet_jax.datasets.tfds_workarounds import EncodedImages, quiet
from mpanet_jax.datasets.verify import require_sound
from mpanet_jax.embeddings import Embeddings
from mpanet_jax.errors import SettingsError, UserError, first_line
from mpanet_jax.files import write_whole
from mpanet_jax.progress import track as progress_bar
from mpanet_jax.settings import DatasetSettings

# In a prepared folder: the raw folder that it was made from.
SOURCE_FILE = "source.txt"


def make_builder(settings: DatasetSettings) -> RawDatasetBuilder:
    """The tfds builder of a data set: as `tfds.builder(name, data_dir=...)` gives it, with the settings' own fields."""
    dataset = make_dataset(settings)
    config = {"config": dataset.variant} if dataset.variant else {}
    builder = builder_class(type(dataset))(data_dir=Path(settings.data_dir).expanduser().absolute(), **config)
    builder.dataset = dataset
    return builder


def prepared_dir(settings: DatasetSettings) -> Path:
    """Where `prepare` puts a data set: tfds's `data_dir/name[/variant]/version`."""
    dataset = make_dataset(settings)
    return Path(settings.data_dir, dataset.name, dataset.variant, VERSION).expanduser()


def is_prepared(settings: DatasetSettings) -> bool:
    """Whether the whole data set is there."""
    directory = prepared_dir(settings)
    files = ["dataset_info.json", *(f"index_{split}.npz" for split in SPLITS)]
    files += [Path(companion).name for companion in make_dataset(settings).companions]
    return all((directory / file).is_file() for file in files)


def prepare(settings: DatasetSettings, *, verify: bool = True, track: Track = no_progress) -> Path:
    """Build a data set below `settings.data_dir` unless it is there, and return its directory.

    The directory appears by one rename when all of it is written: a run that was killed leaves nothing that could
    be taken for a data set, and the next run removes its remains. Runs on one machine wait for each other.

    Args:
      settings: which data set; `source` is its raw folder, '' where the data are expected to be prepared already. Where
        they are, but from another folder or from other lists, a line on stderr says so.
      verify: check the raw folder first, every image decoded; False where that has just been done.
      track: shows a progress bar; see `builder.Track`.

    Raises:
      UserError: neither prepared data nor a source is there, or the source has faults.
    """
    dataset, target = make_dataset(settings), prepared_dir(settings)
    source = Path(settings.source).expanduser() if settings.source else None
    if is_prepared(settings):
        if source:
            _warn_of_another_source(target, source.absolute(), dataset.companions)
        return target
    if not source:
        raise SettingsError(_not_prepared(dataset))
    if not source.is_dir():
        raise SettingsError(
            f"dataset.source: there is no folder {source}; give the raw data set's folder: {_command(dataset)}"
        )
    if verify:
        require_sound(dataset, source, track=track)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"dataset.data_dir: cannot make {target.parent} ({error.strerror})") from error
    with _exclusive(target.parent) as locked:
        if is_prepared(settings):  # another run was quicker
            return target
        if target.exists():
            raise UserError(f"{target}: not a prepared data set of this program; delete it and run again")
        prefix, suffix = "incomplete.", f"_{target.name}"  # tfds's, of directories it is writing
        if locked:
            for remains in target.parent.glob(f"{prefix}*{suffix}"):
                shutil.rmtree(remains, ignore_errors=True)
        builder = make_builder(settings)
        builder.track = track
        with quiet(), tempfile.TemporaryDirectory(suffix, prefix, target.parent) as downloads:
            config = tfds.download.DownloadConfig(manual_dir=source, extract_dir=downloads)
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    with write_whole(target / SOURCE_FILE) as file:
        file.write(str(source.absolute()))
    return target


@functools.cache  # once in a program that opens both splits
def _warn_of_another_source(target: Path, source: Path, companions: tuple[str, ...]) -> None:
    record = target / SOURCE_FILE
    again = "delete the prepared folder, or name another dataset.data_dir, to prepare from there"
    if record.is_file() and (before := record.read_text(errors="replace")) != str(source):
        print(
            f"data: {target} was prepared from {before}; dataset.source = {source} is not read ({again})",
            file=sys.stderr,
        )
        return
    for companion in companions:
        kept, now = target / Path(companion).name, source / companion
        if now.is_file() and now.read_bytes() != kept.read_bytes():
            print(f"data: {now} has changed since {target} was prepared, and is not read ({again})", file=sys.stderr)


@dataclass(frozen=True)
class EvaluationSet:
    """What a model is tested on: a split, and the tests on its rows.

    Attributes:
      title: what the results call it: 'sysu_mm01', 'sysu_mm01 validation'.
    """

    title: str
    split: Split
    evaluations: list[Evaluation]


def open_split(settings: DatasetSettings, split: str) -> Split:
    """A split, 'train' or 'test', of the data set of the settings, prepared on demand from its source.

    With `settings.validation` the training split is its part 'train' alone.

    Raises:
      UserError: as `prepare` and `load_split`; no image of that part.
    """
    prepare(settings, track=progress_bar)
    whole = load_split(settings, split)
    return _part(settings, whole, "train") if split == "train" and settings.validation else whole


def open_evaluation(settings: DatasetSettings, *, validation: bool = False) -> EvaluationSet:
    """The test set, or the validation identities, prepared on demand.

    Raises:
      UserError: as `open_split`.
    """
    dataset = make_dataset(settings)
    if validation:
        prepare(settings, track=progress_bar)
        split = _part(settings, load_split(settings, "train"), "val")
        return _readable(EvaluationSet(f"{dataset.title} validation", split, dataset.validations(split)))
    split = open_split(settings, "test")
    return _readable(EvaluationSet(dataset.title, split, dataset.evaluations(split, prepared_dir(settings))))


def _readable(tested: EvaluationSet) -> EvaluationSet:
    """The set, once all files of its protocols have been read and fit its images: not only after hours of training."""
    split = tested.split

    def images(rows: np.ndarray) -> Embeddings:
        names = None if split.pid_names is None else split.pid_names[rows]
        columns = (split.pids[rows], split.camids[rows], split.paths[rows], split.modality[rows], names)
        return Embeddings(np.zeros((len(rows), 1), np.float32), *columns, source=split.name)

    for test in tested.evaluations:
        test.protocol.comparisons(images(test.query), images(test.gallery))
    return tested


def _part(settings: DatasetSettings, split: Split, part: str) -> Split:
    found = split.only(part)
    if not len(found):
        raise SettingsError(
            f"dataset.validation: no image of the training split in {prepared_dir(settings)} is in the list "
            f"{part!r}; leave validation out, or add such images, delete the folder and prepare it again"
        )
    return found


def load_split(settings: DatasetSettings, split: str) -> Split:
    """Open the prepared split 'train' or 'test': metadata in memory, encoded images on demand.

    The order is `list_images`'s and so the same on every machine. Raises `UserError` when it is not prepared.
    """
    if split not in SPLITS:
        raise UserError(f"split '{split}': expected train or test")
    if not is_prepared(settings):
        raise SettingsError(_not_prepared(make_dataset(settings)))
    again = "delete the directory and prepare it again"
    try:
        builder = make_builder(settings)
    except Exception as error:  # protobuf's and tfds's, for a dataset_info.json or features.json that is damaged
        reason = first_line(error)[:200]
        raise UserError(f"{prepared_dir(settings)}: its dataset_info.json is damaged ({reason}); {again}") from error
    metadata = read_index(Path(builder.data_dir) / f"index_{split}.npz")
    try:
        with quiet():
            method = tfds.decode.DeserializeMethod.RAW_BYTES
            # tfds's decorator hides the parameters from type checkers.
            records = builder.as_data_source(split, deserialize_method=method)  # pyright: ignore[reportCallIssue]
        if len(records) != len(metadata["pids"]):
            raise UserError(f"{builder.data_dir}: records and index differ; {again}")
        for end in np.cumsum(builder.info.splits[split].shard_lengths):
            records[int(end) - 1]  # opens each file
    except (RuntimeError, ValueError, OSError) as error:  # what array_record and tfds raise for a file cut off or gone
        reason = first_line(error)[:200]
        raise UserError(f"{builder.data_dir}: the records of '{split}' are damaged ({reason}); {again}") from error
    return Split(name=f"{builder.dataset.name}/{split}", **metadata, encoded=EncodedImages(records))


def read_index(path: Path) -> dict[str, Any]:
    """The index of a prepared split: the fields of `Split`, but for its name and the images.

    Raises:
      UserError: the file is damaged; nothing of it is taken then.
    """
    try:
        with np.load(path) as index:
            # NumPy reads as much as an array's header says, and a checksum is looked at behind the last byte only.
            if damaged := index.zip.testzip():
                raise ValueError(f"{damaged} is not what was written")
            found: dict[str, Any] = {key: index[key] for key in ("pids", "camids", "modality", "paths")}
            # Version 0.1 wrote no parts.
            found["parts"] = index["parts"] if "parts" in index else np.full(len(found["pids"]), "")
            found["pid_names"] = index.get("pid_names")
            found["fingerprint"] = str(index["fingerprint"])
        if not found["fingerprint"].isalnum():
            raise ValueError("it has no fingerprint")
        for name, column in found.items():
            if name == "fingerprint" or column is None:
                continue
            numbers = name in ("pids", "camids", "modality")
            if column.shape != (len(found["pids"]),) or column.dtype.kind not in ("iu" if numbers else "U"):
                raise ValueError(f"{name} is {column.dtype}{list(column.shape)}")
            column.tolist()  # fails for what is no text
        return found
    except Exception as error:  # whatever numpy and zipfile say about a broken file
        reason = first_line(error)[:200]
        raise UserError(
            f"{path.parent}: {path.name} is damaged ({reason}); delete the directory and prepare it again"
        ) from error


def _command(dataset: Dataset) -> str:
    return f"python scripts/prepare_data.py --dataset {dataset.name} --source DIR"


def _not_prepared(dataset: Dataset) -> str:
    data_dir = dataset.settings.data_dir
    return (
        f"dataset.data_dir: {dataset.title} is not prepared in {data_dir} and dataset.source names no raw folder; "
        f"name it, or run: {_command(dataset)} --data_dir {data_dir}{dataset.options}"
    )


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[bool]:
    """Hold the lock of a directory; the kernel lets it go when the process dies. False where locks do not work."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)
