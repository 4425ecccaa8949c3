"""Checkpoints with orbax: the model, the rest of the training state, and the data iterator, saved together.

A checkpoint holds three items: `model` (params, batch_stats, averages: all that evaluation and export need),
`training` (opt_state, step, rng) and `data` (the position of the batch iterator). Saving is asynchronous and atomic.
Nothing in it depends on the devices or processes that wrote it: arrays are saved once, as one device would hold them,
and the position is the same in all processes (grain's own handler writes, and asks for, one file for each process).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mpanet_jax.errors import UserError, first_line
from mpanet_jax.state import TrainState

MODEL_FIELDS = ("params", "batch_stats", "averages")
TRAINING_FIELDS = ("opt_state", "step", "rng")
OLD_NAMES = {"mean_classifiers": "averages"}  # of items' fields in checkpoints up to version 0.1
# Which checkpoint a report is about → the folder it lies in.
FOLDERS = {"last": "checkpoints", "best": "checkpoints_best"}


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    return {
        "model": {name: getattr(state, name) for name in MODEL_FIELDS},
        "training": {name: getattr(state, name) for name in TRAINING_FIELDS},
    }


class Checkpoints:
    """The checkpoints of one run, `WORKDIR/checkpoints/STEP`; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, keep: int, which: str = "last"):
        """Of the run in `workdir`; the latest `keep` stay. `which` = 'best': those that `train.keep_best` chooses."""
        self._checkpointer = ocp.training.Checkpointer(
            str((workdir / FOLDERS[which]).resolve()),
            # orbax's protocol and its policies name different types for what a policy is shown.
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None  # orbax's response to the last save, until it was waited for

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
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
        self._saving = self._checkpointer.save_checkpointables_async(step, items, force=True)

    def wait(self) -> None:
        """Returns once everything saved so far is on disk."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            # orbax gives every save a thread and an event loop with three file descriptors, and its wait() and close()
            # leave them open: only the response's result() closes them (orbax-checkpoint 0.12.8,
            # synchronization/thread_utils.py, BackgroundThreadRunner; no issue upstream is known).
            saving.result()

    def restore(self, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint as a state like `state` (shapes, types, placement); moves `batches` to its position.

        Raises:
          UserError: the checkpoint is damaged, or does not fit the model of the config.
        """
        items = _items(state)
        directory = Path(self._checkpointer.directory) / str(self.latest_step)
        with _readable(directory):
            missing = {*items, "data"} - set(ocp.checkpointables_metadata(str(directory)).metadata)
            if missing:
                raise UserError(
                    f"{directory}: lacks the {' and '.join(sorted(missing))} that training goes on with; give another "
                    "--workdir (and, to start from weights alone, name them in config.init_from)"
                )
            # Looked at first: what orbax says, from several threads, buries the reason.
            stored = _stored_model(directory)
            if difference := _difference(_renamed(stored, OLD_NAMES), items["model"]):
                raise UserError(
                    f"{directory}: the checkpoint does not fit this config ({difference}); "
                    "continue with the config it was trained with, or give another --workdir"
                )
            written = {OLD_NAMES[name]: name for name in stored if name in OLD_NAMES}
            items["model"] = _renamed(items["model"], written)
            items = self._checkpointer.load_checkpointables(None, {**items, "data": None})
        batches.set_state(items["data"])
        return TrainState(**_renamed(items["model"], OLD_NAMES), **items["training"])


def _renamed(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Whatever orbax and the libraries under it raise for files that are cut off or gone becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        while error.__cause__ is not None:  # the innermost one says what is wrong
            error = error.__cause__
        raise UserError(
            f"{directory}: this checkpoint cannot be read ({first_line(error)[:200]}); if it is damaged, delete it: "
            "the one before, if there is one, is taken then"
        ) from error


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
        option = " --config.eval.best=rank1" if which == "best" else ""
        raise UserError(
            f"{directory}: no checkpoint here; train first: python scripts/train.py --workdir={workdir}{option} …"
        )
    newest = directory / str(steps[-1])
    device = SingleDeviceSharding(jax.local_devices()[0])
    with _readable(newest), _alone():
        stored = _stored_model(newest)
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
        model = ocp.load_checkpointables(str(newest), {"model": abstract})["model"]
        return steps[-1], _renamed(model, OLD_NAMES)
