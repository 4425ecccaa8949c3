"""Checkpoints with orbax: the model, the rest of the training state, and the data iterator, saved together.

A checkpoint holds three items: `model` (params, batch_stats, averages: all that evaluation and export need),
`training` (opt_state, step, rng) and `data` (the position of the batch iterator). Saving is asynchronous and atomic.
Once a checkpoint is whole, the checksums of its files are added; reading it checks them first.

Nothing in a checkpoint depends on the devices or processes that wrote it. Arrays are saved once, as one device would
hold them, and the position is the same in all processes (grain's own handler needs one file for each process).
"""

import contextlib
import itertools
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mpanet_jax.checkpoint_check import (
    DamagedCheckpoint,
    check_files,
    is_finite,
    model_shapes,
    quiet_orbax,
    readable,
    shape_difference,
)
from mpanet_jax.checksums import write_checksums
from mpanet_jax.errors import UserError, lacks_room
from mpanet_jax.processes import gather, is_first_process, wait_for_all_processes
from mpanet_jax.state import TrainState, copy_on_device

MODEL_FIELDS = ("params", "batch_stats", "averages")
TRAINING_FIELDS = ("opt_state", "step", "rng")
OLD_NAMES = {"mean_classifiers": "averages"}  # of items' fields in checkpoints up to version 0.1
# Which checkpoint → its folder in the workdir.
FOLDERS = {"last": "checkpoints", "best": "checkpoints_best"}
DAMAGED_FOLDER = "checkpoints_damaged"

# Held while orbax starts a save: two that start at the same time make each other's folders (orbax-checkpoint 0.12.8).
_STARTING = threading.Lock()


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    return {
        "model": {name: getattr(state, name) for name in MODEL_FIELDS},
        "training": {name: getattr(state, name) for name in TRAINING_FIELDS},
    }


class Checkpoints:
    """The checkpoints of one run, `WORKDIR/checkpoints/STEP`; a context manager that waits for the last save.

    Args:
      workdir: of the run.
      keep: how many are kept, the latest ones.
      which: 'last', or 'best' for those that `keep_best` chooses, in WORKDIR/checkpoints_best.

    Raises:
      UserError: there is a file where the folder of checkpoints would be.
    """

    def __init__(self, workdir: Path, keep: int, which: str = "last"):
        quiet_orbax()
        for folder in (workdir / name for name in (*FOLDERS.values(), DAMAGED_FOLDER)):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: not a folder; move it away, checkpoints go there")
        self._workdir = workdir
        self._checkpointer = ocp.training.Checkpointer(
            str((workdir / FOLDERS[which]).resolve()),
            # orbax's protocol and its policies name different types for a policy's argument.
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )
        self._finishing = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None  # the last save, until somebody has waited for it

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = True
        try:
            self.wait()
            failed = kind is not None
        finally:
            self._finishing.shutdown()
            with contextlib.suppress(*[Exception] if failed else []):  # orbax raises a failed save a second time
                self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, batches: Any) -> None:
        """Starts to save the state; when this returns, the next step may donate it.

        orbax takes half a second to copy the arrays off the device, which would wait. So a thread gives it a copy on
        the device. The call takes as long as orbax if there is no room for that, and in a run of several processes,
        which agree on a save by programs whose order among the steps must be the same in all.

        Args:
          step: how many steps are done; the checkpoint's name.
          state: after them.
          batches: what has given the batches of these steps; its position is saved, as its `get_state` gives it.

        Raises:
          UserError: there was no room for the save before this one.
        """
        self.wait()  # orbax would wait too, but not raise a `UserError`
        arrays, position = _items(state), {"data": batches.get_state()}
        copied = copy_on_device(arrays) if jax.process_count() == 1 else None
        if copied is None:
            self._saving = self._finishing.submit(self._finish, step, self._start(step, arrays | position))
        else:
            items = [copied | position]  # popped: the device's copy goes once orbax has its own
            self._saving = self._finishing.submit(lambda: self._finish(step, self._start(step, items.pop())))

    def _start(self, step: int, items: dict[str, Any]) -> Any:
        with _STARTING:
            return self._checkpointer.save_checkpointables_async(step, items, force=True)

    def _finish(self, step: int, saving: Any) -> None:
        # orbax gives every save a thread and an event loop with three file descriptors, and its wait() and close()
        # leave them open: only the response's result() closes them (orbax-checkpoint 0.12.8,
        # synchronization/thread_utils.py, BackgroundThreadRunner; no issue upstream is known).
        saving.result()
        self._write_checksums(step)

    def _write_checksums(self, step: int) -> None:
        if is_first_process():
            write_checksums(self._folder(step))

    def _folder(self, step: int) -> Path:
        return Path(self._checkpointer.directory) / str(step)

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: there is no room for it; the checkpoints before it stay.
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
        """Raises the error of the last save if that has failed already; does not wait for it."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def restore(self, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """Reads the newest sound checkpoint.

        A checkpoint that is damaged or holds NaN is moved to WORKDIR/checkpoints_damaged, with a line on stderr, and
        the one before it is tried.

        Args:
          state: of a new run; its shapes, types and devices are those of the result.
          batches: the iterator; it is moved to the checkpoint's position.

        Returns:
          The state that was saved.

        Raises:
          UserError: no checkpoint is sound, or the newest sound one does not fit the model.
        """
        while (step := self.latest_step) is not None:
            found = damaged = None
            try:
                found = self._restore(step, state, batches)
            except DamagedCheckpoint as error:
                damaged = error
            if not any(gather(int(damaged is not None), "the choice of a checkpoint")):
                assert found is not None
                return found
            self._set_aside(step, damaged)
        raise UserError(
            f"{self._checkpointer.directory}: no sound checkpoint is left to go on from; the same command, given "
            "again, starts the run from the beginning"
        )

    def _set_aside(self, step: int, reason: DamagedCheckpoint | None) -> None:
        aside = self._workdir / DAMAGED_FOLDER / str(step)
        if is_first_process():
            aside.parent.mkdir(exist_ok=True)
            free = (aside.with_name(f"{step}-{number}") for number in itertools.count(2))
            aside = next(free) if aside.exists() else aside
            self._folder(step).rename(aside)
            print(
                f"{self._folder(step)}: damaged ({reason}), moved to {aside}; the one before it is used",
                file=sys.stderr,
            )
        wait_for_all_processes("the choice of a checkpoint")
        self._checkpointer.reload()

    def _restore(self, step: int, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
        items, directory = _items(state), self._folder(step)
        with readable():
            check_files(directory)  # first: orbax's errors, from several threads, would bury the reason
            missing = {*items, "data"} - set(ocp.checkpointables_metadata(str(directory)).metadata)
            if "model" in missing:
                raise DamagedCheckpoint("it lacks the model")
            if missing:
                raise UserError(
                    f"{directory}: lacks the {' and '.join(sorted(missing))}, which training needs to go on; give "
                    "another workdir (to start from these weights alone, name them in init_from)"
                )
            stored = model_shapes(directory)
            if difference := shape_difference(_renamed(stored, OLD_NAMES), items["model"]):
                raise UserError(
                    f"{directory}: the checkpoint does not fit these settings ({difference}); "
                    "continue with the settings it was trained with, or give another workdir"
                )
            written = {OLD_NAMES[name]: name for name in stored if name in OLD_NAMES}
            items["model"] = _renamed(items["model"], written)
            items = self._checkpointer.load_checkpointables(step, {**items, "data": None})
        if not is_finite((items["model"], items["training"])):
            raise DamagedCheckpoint("it holds NaN or infinite numbers")
        if int(items["training"]["step"]) != step:
            raise DamagedCheckpoint(f"it is of step {int(items['training']['step'])}")
        batches.set_state(items["data"])
        return TrainState(**_renamed(items["model"], OLD_NAMES), **items["training"])


def _renamed(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}


def latest_step(workdir: str | Path, which: str = "last") -> int | None:
    """The step of a run's newest whole checkpoint, of its 'last' or its 'best' ones; None where there is none."""
    names = (path.name for path in (Path(workdir) / FOLDERS[which]).glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=None)  # unfinished ones have other names


def _alone() -> ocp.Context:
    """A context in which orbax waits for no other process: the others may not be reading."""
    context, this = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = this
    context.multiprocessing.active_processes = {this}
    context.multiprocessing.barrier_sync_key_prefix = f"process {this}"
    return context


def load_model(workdir: Path, which: str = "last") -> tuple[int, dict[str, Any]]:
    """Reads the model of a run's newest checkpoint; each of several processes reads for itself and waits for no other.

    Args:
      workdir: of the run.
      which: 'last' or 'best'.

    Returns:
      The checkpoint's step, and {params, batch_stats, averages} on this process's first device.

    Raises:
      UserError: the workdir has no such checkpoint, or no whole one yet, or the newest is damaged.
    """
    directory = (Path(workdir) / FOLDERS[which]).resolve()
    if (step := latest_step(workdir, which)) is None:
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(
                f"{directory}: its first checkpoint is still being written, or was cut off; "
                "wait until it is there, or start that run again"
            )
        option = ", with eval.best = 'rank1'" if which == "best" else ""
        raise UserError(f"{directory}: no checkpoint here; train first{option}")
    newest = directory / str(step)
    device = SingleDeviceSharding(jax.local_devices()[0])
    quiet_orbax()
    try:
        with readable(), _alone():
            check_files(newest)
            stored = model_shapes(newest)
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
            model = ocp.load_checkpointables(str(newest), {"model": abstract})["model"]
        if not is_finite(model):
            raise DamagedCheckpoint("it holds NaN or infinite numbers")
    except DamagedCheckpoint as error:
        raise UserError(
            f"{newest}: this checkpoint is damaged ({error}); move it away to use the one before it, if there is one, "
            "or start training again, which does that by itself"
        ) from error
    return step, _renamed(model, OLD_NAMES)
