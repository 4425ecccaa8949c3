"""Prepared data sets: build them once, all or nothing, and open their splits quickly."""

import contextlib
import dataclasses
import fcntl
import functools
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.proto import tf_example_pb2

from mpanet_jax.datasets import llcm, regdb, sysu_mm01
from mpanet_jax.datasets.builder import SPLITS, VERSION, RawDatasetBuilder, Track, no_progress, progress_bar
from mpanet_jax.datasets.schema import Split
from mpanet_jax.datasets.verify import require_sound
from mpanet_jax.errors import SettingsError, UserError, first_line
from mpanet_jax.settings import DatasetSettings, expected_one_of, from_dict

# In a prepared folder: the raw folder that it was made from.
SOURCE_FILE = "source.txt"
BUILDERS = {"sysu_mm01": sysu_mm01.SysuMm01, "regdb": regdb.Regdb, "llcm": llcm.Llcm}
# The settings of those that have fields of their own.
SETTINGS = {"regdb": regdb.RegdbSettings}


def settings_of(tree: Mapping[str, Any]) -> DatasetSettings:
    """The settings that plain values describe; they may hold other data sets' own fields, at their defaults.

    Raises:
      SettingsError: an unknown data set or field, or a value that cannot be.
    """
    name = tree.get("name", DatasetSettings.name)
    if name not in BUILDERS:
        raise SettingsError(f"dataset.name {expected_one_of(name, BUILDERS)}")
    chosen = SETTINGS.get(name, DatasetSettings)
    own = {field.name for field in dataclasses.fields(chosen)}
    foreign = {
        field.name: (owner, field.default)
        for owner, cls in SETTINGS.items()
        for field in dataclasses.fields(cls)
        if field.name not in own
    }
    for field in foreign.keys() & tree.keys():
        owner, default = foreign[field]
        if tree[field] != default:
            raise SettingsError(f"dataset.{field} = {tree[field]!r}: a field of {owner!r}, not of {name!r}")
    return from_dict(chosen, {field: value for field, value in tree.items() if field not in foreign}, "dataset.")


def make_builder(name: str, data_dir: str | Path, *, trial: int = 1) -> RawDatasetBuilder:
    """The tfds builder of a data set: the same as `tfds.builder(name, data_dir=...)`.

    Raises `UserError` for an unknown `name` and, on RegDB, for a `trial` outside 1..10.
    """
    _check_name(name, trial)
    config = {"config": f"split_{trial}"} if name == "regdb" else {}
    return BUILDERS[name](data_dir=Path(data_dir).expanduser().absolute(), **config)


def prepared_dir(name: str, data_dir: str | Path, *, trial: int = 1) -> Path:
    """Where `prepare` puts a data set: tfds's `data_dir/name[/split_N]/version`. Raises as `make_builder`."""
    _check_name(name, trial)
    return Path(data_dir, name, *([f"split_{trial}"] if name == "regdb" else []), VERSION).expanduser()


def is_prepared(name: str, data_dir: str | Path, *, trial: int = 1) -> bool:
    """Whether the whole data set is there. Raises as `make_builder`."""
    directory = prepared_dir(name, data_dir, trial=trial)
    files = ["dataset_info.json", *(f"index_{split}.npz" for split in SPLITS)]
    files += [Path(companion).name for companion in BUILDERS[name].companions]
    return all((directory / file).is_file() for file in files)


def prepare(
    name: str,
    source: str | Path | None,
    data_dir: str | Path,
    *,
    trial: int = 1,
    verify: bool = True,
    track: Track = no_progress,
) -> Path:
    """Build a data set below `data_dir` unless it is there, and return its directory.

    The directory appears by one rename when all of it is written: a run that was killed leaves nothing that could
    be taken for a data set, and the next run removes its remains. Runs on one machine wait for each other.

    Args:
      name: 'sysu_mm01', 'regdb' or 'llcm'.
      source: the raw folder; None or '' where the data are expected to be prepared already. Where they are, but from
        another folder, a line on stderr says so.
      data_dir: tfds's data_dir.
      trial: RegDB's split, 1 to 10; not used by the others.
      verify: check the raw folder first, every image decoded; False where that has just been done.
      track: shows a progress bar; see `builder.Track`.

    Raises:
      UserError: neither prepared data nor a source is there, or the source has faults.
    """
    target = prepared_dir(name, data_dir, trial=trial)
    if is_prepared(name, data_dir, trial=trial):
        if source:
            _warn_of_another_source(target, Path(source).expanduser().absolute())
        return target
    if not source:
        raise UserError(_not_prepared(name, data_dir, trial))
    source = Path(source).expanduser()
    if not source.is_dir():
        raise UserError(
            f"config.dataset.source: there is no folder {source}; give the raw data set's folder: {_command(name)}"
        )
    if verify:
        require_sound(name, source, trials=(trial,), track=track)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"config.dataset.data_dir: cannot make {target.parent} ({error.strerror})") from error
    with _exclusive(target.parent) as locked:
        if is_prepared(name, data_dir, trial=trial):  # another run was quicker
            return target
        if target.exists():
            raise UserError(f"{target}: not a prepared data set of this program; delete it and run again")
        prefix, suffix = "incomplete.", f"_{target.name}"  # tfds's, of directories it is writing
        if locked:
            for remains in target.parent.glob(f"{prefix}*{suffix}"):
                shutil.rmtree(remains, ignore_errors=True)
        builder = make_builder(name, data_dir, trial=trial)
        builder.track = track
        with _quiet(), tempfile.TemporaryDirectory(suffix, prefix, target.parent) as downloads:
            config = tfds.download.DownloadConfig(manual_dir=source, extract_dir=downloads)
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    (target / SOURCE_FILE).write_text(str(source.absolute()))
    return target


@functools.cache  # once in a program that opens both splits
def _warn_of_another_source(target: Path, source: Path) -> None:
    record = target / SOURCE_FILE
    if record.is_file() and (before := record.read_text()) != str(source):
        print(
            f"data: {target} was prepared from {before}; config.dataset.source = {source} is not read (delete the "
            "prepared folder, or name another config.dataset.data_dir, to prepare from there)",
            file=sys.stderr,
        )


def open_split(dataset: DatasetSettings, split: str) -> Split:
    """A split, 'train' or 'test', of the data set of the settings, prepared on demand from its source."""
    trial = dataset.trial or 1
    prepare(dataset.name, dataset.source, dataset.data_dir, trial=trial, track=progress_bar)
    return load_split(dataset.name, dataset.data_dir, split, trial=trial)


def load_split(name: str, data_dir: str | Path, split: str, *, trial: int = 1) -> Split:
    """Open the prepared split 'train' or 'test': metadata in memory, encoded images on demand.

    The order is `list_images`'s and so the same on every machine. Raises `UserError` when it is not prepared.
    """
    if split not in SPLITS:
        raise UserError(f"split '{split}': expected train or test")
    if not is_prepared(name, data_dir, trial=trial):
        raise UserError(_not_prepared(name, data_dir, trial))
    builder = make_builder(name, data_dir, trial=trial)
    again = "delete the directory and prepare it again"
    try:
        with np.load(Path(builder.data_dir) / f"index_{split}.npz") as index:
            metadata = {key: index[key] for key in ("pids", "camids", "modality", "paths")}
            fingerprint = str(index["fingerprint"])
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{builder.data_dir}: index_{split}.npz is damaged ({error}); {again}") from error
    try:
        with _quiet():
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
    return Split(name=f"{name}/{split}", **metadata, encoded=EncodedImages(records), fingerprint=fingerprint)


def permutation_file(data_dir: str | Path) -> Path:
    """The prepared SYSU-MM01's copy of `rand_perm_cam.mat`. Raises `UserError` when it is not there."""
    path = prepared_dir("sysu_mm01", data_dir) / Path(sysu_mm01.PERMUTATION).name
    if not path.is_file():
        raise UserError(_not_prepared("sysu_mm01", data_dir, 1))
    return path


class EncodedImages(Sequence):
    """`encoded[i]`: image i's file as bytes. Safe to use from many threads, picklable for worker processes.

    Takes the one field out of the serialised record itself: tfds's parser of whole records works in Python, under its
    lock, and takes four times as long as the read.
    """

    def __init__(self, records: Sequence[bytes]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        record = self._records[range(len(self._records))[index]]  # IndexError ends iteration; the source's own is not
        # protobuf makes the module's classes when it is imported.
        return tf_example_pb2.Example.FromString(record).features.feature["image"].bytes_list.value[0]  # pyright: ignore[reportAttributeAccessIssue]


def _check_name(name: str, trial: int) -> None:
    if name not in BUILDERS:
        raise UserError(f"config.dataset.name '{name}': expected one of {', '.join(BUILDERS)}")
    if name == "regdb" and trial not in regdb.TRIALS:
        raise UserError(f"config.dataset.trial = {trial}: RegDB has the trials 1 to 10")


def _command(name: str) -> str:
    return f"python scripts/prepare_data.py --dataset {name} --source DIR"


def _not_prepared(name: str, data_dir: str | Path, trial: int) -> str:
    what = f"{name} trial {trial}" if name == "regdb" else name
    command = _command(name) + f" --data_dir {data_dir}" + (f" --trial {trial}" if name == "regdb" else "")
    return (
        f"config.dataset.data_dir: {what} is not prepared in {data_dir} and config.dataset.source names no raw "
        f"folder; run: {command}"
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep tfds's own messages and progress bars off the terminal."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
