"""Checkpoints with orbax: the model, the rest of the training state, and the data iterator, saved together.

A checkpoint holds three items: `model` (params, batch_stats, averages: all that evaluation and export need),
`training` (opt_state, step, rng) and `data` (the position of the batch iterator). Saving is asynchronous and atomic;
once a checkpoint is whole, checksums of its files are added, by which damage is found before anything is taken from it.
Nothing in it depends on the devices or processes that wrote it: arrays are saved once, as one device would hold them,
and the position is the same in all processes (grain's own handler writes, and asks for, one file for each process).
"""

import contextlib
import functools
import itertools
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mpanet_jax.checksums import damage, write_checksums
from mpanet_jax.errors import UserError, first_line, lacks_room
from mpanet_jax.processes import gather, is_first_process, wait_for_all_processes
from mpanet_jax.state import TrainState

MODEL_FIELDS = ("params", "batch_stats", "averages")
TRAINING_FIELDS = ("opt_state", "step", "rng")
OLD_NAMES = {"mean_classifiers": "averages"}  # of items' fields in checkpoints up to version 0.1
# Which checkpoint a report is about → the folder it lies in.
FOLDERS = {"last": "checkpoints", "best": "checkpoints_best"}
DAMAGED_FOLDER = "checkpoints_damaged"


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    return {
        "model": {name: getattr(state, name) for name in MODEL_FIELDS},
        "training": {name: getattr(state, name) for name in TRAINING_FIELDS},
    }


class _Damaged(Exception):
    """A checkpoint that nothing can go on from; the message says why."""


class Checkpoints:
    """The checkpoints of one run, `WORKDIR/checkpoints/STEP`; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, keep: int, which: str = "last"):
        """Of the run in `workdir`; the latest `keep` stay. `which` = 'best': those that `keep_best` chooses."""
        _quiet_orbax()
        for folder in (workdir / name for name in (*FOLDERS.values(), DAMAGED_FOLDER)):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: not a folder; move it away, checkpoints go there")
        self._workdir = workdir
        self._checkpointer = ocp.training.Checkpointer(
            str((workdir / FOLDERS[which]).resolve()),
            # orbax's protocol and its policies name different types for what a policy is shown.
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )
        self._finishing = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None  # the last save, until it was waited for

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = True
        try:
            self.wait()
            failed = kind is not None
        finally:
            self._finishing.shutdown()
            with contextlib.suppress(*[Exception] if failed else []):  # orbax says a failed save again
                self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Starts saving; returns once the device's arrays are copied, so that the next step may donate them."""
        self.wait()  # as orbax would do
        items = {**_items(state), "data": batches.get_state()}
        saving = self._checkpointer.save_checkpointables_async(step, items, force=True)
        self._saving = self._finishing.submit(self._finish, step, saving)

    def _finish(self, step: int, saving: Any) -> None:
        # orbax gives every save a thread and an event loop with three file descriptors, and its wait() and close()
        # leave them open: only the response's result() closes them (orbax-checkpoint 0.12.8,
        # synchronization/thread_utils.py, BackgroundThreadRunner; no issue upstream is known).
        saving.result()
        if is_first_process():
            write_checksums(self._folder(step))

    def _folder(self, step: int) -> Path:
        return Path(self._checkpointer.directory) / str(step)

    def wait(self) -> None:
        """Returns once everything saved so far is on disk.

        Raises:
          UserError: there is no room for it; the checkpoints before stay.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            if not lacks_room(error):
                raise
            raise UserError(
                f"{self._checkpointer.directory}: no room for a checkpoint; make room there, and start again with the "
                f"same command: the run goes on from step {latest_step(self._workdir) or 0}"
            ) from error

    def raise_failure(self) -> None:
        """Raises what the save under way has failed with, if it has; waits for nothing."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def restore(self, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The newest sound checkpoint as a state like `state` (shapes, types, placement); moves `batches` to its place.

        Newer ones that are damaged, or hold NaN, go to WORKDIR/checkpoints_damaged; a line on stderr says so.

        Raises:
          UserError: none is sound, or it does not fit the model of the config.
        """
        while (step := self.latest_step) is not None:
            found = damaged = None
            try:
                found = self._restore(step, state, batches)
            except _Damaged as error:
                damaged = error
            if not any(gather(int(damaged is not None), "the choice of a checkpoint")):
                assert found is not None
                return found
            self._set_aside(step, damaged)
        raise UserError(
            f"{self._checkpointer.directory}: no sound checkpoint is left there to go on from; the same command again "
            "starts the run from the beginning"
        )

    def _set_aside(self, step: int, reason: _Damaged | None) -> None:
        aside = self._workdir / DAMAGED_FOLDER / str(step)
        if is_first_process():
            aside.parent.mkdir(exist_ok=True)
            free = (aside.with_name(f"{step}-{number}") for number in itertools.count(2))
            aside = next(free) if aside.exists() else aside
            self._folder(step).rename(aside)
            print(f"{self._folder(step)}: damaged ({reason}), now {aside}; the one before is taken", file=sys.stderr)
        wait_for_all_processes("the choice of a checkpoint")
        self._checkpointer.reload()

    def _restore(self, step: int, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
        items, directory = _items(state), self._folder(step)
        with _readable(directory):
            # Looked at first: what orbax says, from several threads, buries the reason.
            _check_files(directory)
            missing = {*items, "data"} - set(ocp.checkpointables_metadata(str(directory)).metadata)
            if "model" in missing:
                raise _Damaged("it lacks the model")
            if missing:
                raise UserError(
                    f"{directory}: lacks the {' and '.join(sorted(missing))} that training goes on with; give another "
                    "workdir (and, to start from weights alone, name them in init_from)"
                )
            stored = _stored_model(directory)
            if difference := _difference(_renamed(stored, OLD_NAMES), items["model"]):
                raise UserError(
                    f"{directory}: the checkpoint does not fit these settings ({difference}); "
                    "continue with the settings it was trained with, or give another workdir"
                )
            written = {OLD_NAMES[name]: name for name in stored if name in OLD_NAMES}
            items["model"] = _renamed(items["model"], written)
            items = self._checkpointer.load_checkpointables(step, {**items, "data": None})
        if not is_finite((items["model"], items["training"])):
            raise _Damaged("it holds NaN or infinite numbers")
        if int(items["training"]["step"]) != step:
            raise _Damaged(f"it is of step {int(items['training']['step'])}")
        batches.set_state(items["data"])
        return TrainState(**_renamed(items["model"], OLD_NAMES), **items["training"])


class _Unsaid(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname


@functools.cache
def _quiet_orbax() -> None:
    """orbax logs an exception in each of the threads that it passes through, with tracebacks, before it raises it."""
    absl_logging.get_absl_logger().addFilter(_Unsaid())


def is_finite(tree: Any) -> bool:
    """Whether all numbers of a tree of arrays are finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(jax.device_get(list(map(_all_finite, leaves))))


# An array at a time: one program for all of them would take long to compile.
_all_finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())


def _check_files(directory: Path) -> None:
    if not any(directory.iterdir()):
        raise _Damaged("it is an empty folder")
    if fault := damage(directory):
        raise _Damaged(fault)


def _renamed(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Whatever orbax and the libraries under it raise for files that are cut off or gone becomes `_Damaged`."""
    try:
        yield
    except (UserError, _Damaged):
        raise
    except Exception as error:
        while error.__cause__ is not None:  # the innermost one says what is wrong
            error = error.__cause__
        raise _Damaged(f"it cannot be read: {first_line(error)[:200]}") from error


def _stored_model(directory: Path) -> Any:
    """The item `model` of one checkpoint as a tree of shapes and types."""
    stored = ocp.metadata(str(directory), checkpointable_name="model").metadata
    if not jax.tree.leaves(stored):
        raise ValueError("its list of arrays is empty")
    return stored


def _difference(stored: Any, wanted: Any) -> str | None:
    """The first array that is not the same in both trees, in words; None where there is none."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    stored, wanted = shapes(stored), shapes(wanted)
    for name in wanted | stored:
        if stored.get(name) != wanted.get(name):
            return f"{name}: {stored.get(name, 'nothing')} stored, {wanted.get(name, 'nothing')} in the config's model"
    return None


def _whole_steps(directory: Path) -> list[int]:
    """The steps of the whole checkpoints in a folder of checkpoints; one that is being written has another name."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def latest_step(workdir: str | Path) -> int | None:
    """The step of a run's newest whole checkpoint; None where there is none."""
    return max(_whole_steps(Path(workdir) / FOLDERS["last"]), default=None)


def has_checkpoint(workdir: Path) -> bool:
    """Whether there is a whole checkpoint from which the run in `workdir` goes on."""
    return bool(_whole_steps(workdir / FOLDERS["last"]))


def _alone() -> ocp.Context:
    """In this context orbax waits for no other process, which may have another thing to do."""
    context, this = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = this
    context.multiprocessing.active_processes = {this}
    context.multiprocessing.barrier_sync_key_prefix = f"process {this}"
    return context


def load_model(workdir: Path, which: str = "last") -> tuple[int, dict[str, Any]]:
    """The last (or best) checkpoint's step and model {params, batch_stats, averages}, on this process's first device.

    Of several processes each reads for itself, and waits for no other.

    Raises:
      UserError: the workdir has no such checkpoint, or not yet, or it is damaged.
    """
    directory = (Path(workdir) / FOLDERS[which]).resolve()
    if not (steps := _whole_steps(directory)):
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(
                f"{directory}: its first checkpoint is still being written, or was cut off; "
                "wait until it is there, or have that run go on"
            )
        option = ", with eval.best = 'rank1'" if which == "best" else ""
        raise UserError(f"{directory}: no checkpoint here; train first{option}")
    newest = directory / str(steps[-1])
    device = SingleDeviceSharding(jax.local_devices()[0])
    _quiet_orbax()
    try:
        with _readable(newest), _alone():
            _check_files(newest)
            stored = _stored_model(newest)
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
            model = ocp.load_checkpointables(str(newest), {"model": abstract})["model"]
        if not is_finite(model):
            raise _Damaged("it holds NaN or infinite numbers")
    except _Damaged as error:
        raise UserError(
            f"{newest}: this checkpoint is damaged ({error}); move it away, and the one before, if there is one, is "
            "taken; training, started again, does so by itself"
        ) from error
    return steps[-1], _renamed(model, OLD_NAMES)
