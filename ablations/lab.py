"""Trains the rows of a table with several seeds, keeps the results in one JSON file, and continues from it.

A row's seeds share a process, so that the row is compiled once; the lab's own process uses no accelerator. Each run is
stored as soon as it is finished. The JSON file alone is enough to continue, on another machine too.
"""

import fcntl
import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mpanet_jax.errors import UserError, first_line
from mpanet_jax.files import write_whole
from mpanet_jax.methods import settings_of
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import flat, replace, to_dict

# Settings that a run's figures do not depend on, such as where its data are; and the seed.
IGNORED_FIELDS = (
    *("seed", "preset", "parallel", "dataset.source", "dataset.data_dir", "data.cache", "data.num_workers"),
    "data.resize_on",
    *("model.fused", "eval.batch_size", "eval.best", "train.eval_every_epochs", "train.checkpoint_every_epochs"),
    *("train.keep_checkpoints", "train.log_every_steps", "train.steps_per_call"),
)

COMPILING = "compiling.lock"  # in the workdir of the lab: held by the row that is compiled

Report = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
      row: the name of the row that it was run for.
      settings: the run's settings.
      outcome: {"metrics": on the test split, "images": seen in training, "seconds", "device"}, or {"error": why}.
    """

    row: str
    settings: Settings
    outcome: dict[str, Any]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """`recipe_of` its settings."""
        return recipe_of(self.settings)


def recipe_of(settings: Settings) -> dict[str, Any]:
    """{field: value} of all fields that a run's figures depend on, except the seed."""
    return {name: value for name, value in flat(to_dict(settings)).items() if name not in IGNORED_FIELDS}


@dataclass
class Results:
    """The runs in the JSON file `path`: {"runs": [{"row", "settings", and the entries of the outcome}, …]}."""

    path: Path
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read the runs of a file; a file that does not exist has none.

        Raises:
          UserError: the file does not hold results of ablations.
        """
        if not path.exists():
            return cls(path)
        try:
            runs = []
            for entry in json.loads(path.read_text())["runs"]:
                run = Run(entry.pop("row"), settings_of(entry.pop("settings")), entry)
                if ("metrics" in entry) == ("error" in entry):
                    raise ValueError(f"a run of row {run.row!r} has neither metrics nor an error, or both")
                runs.append(run)
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{path}: not the results of ablations ({first_line(error)}); give another --out") from None
        return cls(path, runs)

    def check(self, row: str, settings: Settings) -> None:
        """Check that a row's finished runs have the recipe of `settings`.

        Raises:
          UserError: they have another one; the message names the fields that differ.
        """
        recipe = recipe_of(settings)
        for run in self.runs:
            if run.row != row or "error" in run.outcome or run.recipe == recipe:
                continue
            names = sorted(name for name in recipe | run.recipe if recipe.get(name) != run.recipe.get(name))
            fields = ", ".join(f"{name} = {recipe.get(name)!r} ({run.recipe.get(name)!r} there)" for name in names)
            raise UserError(f"{self.path}: row {row!r} was run with other settings, {fields}; give another --out")

    def finished(self, settings: Settings) -> dict[int, dict[str, Any]]:
        """{seed: outcome} of the finished runs with this recipe, whatever the name of their row."""
        recipe = recipe_of(settings)
        return {r.settings.seed: r.outcome for r in self.runs if "error" not in r.outcome and r.recipe == recipe}

    def errors(self, settings: Settings) -> dict[int, str]:
        """{seed: error} of the failed runs with this recipe, without seeds that have been finished since."""
        recipe, finished = recipe_of(settings), self.finished(settings)
        failed = [r for r in self.runs if "error" in r.outcome and r.recipe == recipe]
        return {r.settings.seed: r.outcome["error"] for r in failed if r.settings.seed not in finished}

    def add(self, run: Run) -> None:
        """Store a run in the file, in place of an earlier run of its row and seed."""
        place = run.row, run.settings.seed
        self.runs = [r for r in self.runs if (r.row, r.settings.seed) != place] + [run]
        self.runs.sort(key=lambda r: (r.row, r.settings.seed))
        entries = [{"row": r.row, **r.outcome, "settings": to_dict(r.settings)} for r in self.runs]
        with write_whole(self.path) as file:
            file.write(json.dumps({"runs": entries}, indent=2) + "\n")


@dataclass(frozen=True)
class Work:
    """The runs of a row that are still to be done, as their settings: one for each seed."""

    row: str
    runs: tuple[Settings, ...]


def work_left(rows: Mapping[str, Settings], seeds: Sequence[int], results: Results) -> list[Work]:
    """The runs that `results` lacks.

    Args:
      rows: {row's name: its settings, with any seed}; of rows with the same recipe, only the first is run.
      seeds: the seeds of every row.
      results: the runs so far.

    Returns:
      The work in the order of `rows`.

    Raises:
      UserError: a row was run with other settings.
    """
    left, recipes = [], []
    for row, settings in rows.items():
        results.check(row, settings)
        missing = [seed for seed in seeds if seed not in results.finished(settings)]
        if missing and recipe_of(settings) not in recipes:
            left.append(Work(row, tuple(replace(settings, {"seed": seed}) for seed in missing)))
            recipes.append(recipe_of(settings))
    return left


@dataclass(frozen=True)
class Options:
    """Options of a row's process.

    Attributes:
      workdir: the folder for the runs' workdirs, ROW_SEED, and the rows' output, ROW.log.
      deadline: the time after which no run starts, as `time.time` gives it, in seconds.
      compilation_cache: a folder for compiled programs; '': none.
      memory_share: the share of an accelerator's memory that the process may take, from 0 to 1; None: JAX's default.
    """

    workdir: Path
    deadline: float
    compilation_cache: str
    memory_share: float | None = None


def train_row(work: Work, options: Options) -> Iterator[dict[str, Any]]:
    """Train the runs of a row, one after the other; yields the outcome of each (`Run.outcome`).

    From the start of a row's process until its first steps are done no other row starts: XLA times the kernels that it
    chooses from, and several processes that do so on one accelerator take many times as long, and choose badly.
    """
    with open(options.workdir / COMPILING, "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # the system releases it, however the process ends
        yield from _train_runs(work, options, on_steps=lambda *_: fcntl.flock(turn, fcntl.LOCK_UN))


def _train_runs(work: Work, options: Options, on_steps: Callable[[int, float], None]) -> Iterator[dict[str, Any]]:
    import jax

    from mpanet_jax.compilation import set_compilation_cache
    from mpanet_jax.loop import train
    from mpanet_jax.run_setup import Programs

    set_compilation_cache(options.compilation_cache)
    programs = Programs()
    for settings in work.runs:
        if time.time() > options.deadline:
            return
        begin = time.perf_counter()
        workdir = options.workdir / f"{work.row}_{settings.seed}"
        metrics = train(settings, workdir, programs=programs, on_steps=on_steps)
        device, data = jax.devices()[0], settings.data
        steps = next(iter(metrics.values()))["step"]
        yield {
            "metrics": metrics,
            "images": steps * data.num_ids_per_batch * data.images_per_id,
            "seconds": round(time.perf_counter() - begin, 1),
            "device": f"{jax.device_count()} × {device.device_kind}",
        }


def _end_with_the_lab() -> None:
    """Ends this process with the lab, so that the row of a killed lab does not keep the accelerator."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _process(work: Work, options: Options, connection: Connection) -> None:
    """What a row's process does: it sends each outcome, then None; an error or the end of the lab ends it."""
    threading.Thread(target=_end_with_the_lab, daemon=True).start()
    if options.memory_share is not None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{options.memory_share:.2f}")
    with open(options.workdir / f"{work.row}.log", "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        for outcome in train_row(work, options):
            connection.send(outcome)
    except UserError as error:
        connection.send({"error": first_line(error)})
    except Exception as error:
        traceback.print_exc()
        connection.send({"error": f"{type(error).__name__}: {first_line(error)}"})
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM: not a failure; the lab has been stopped too
        return
    connection.send(None)


def run_work(
    left: Sequence[Work],
    results: Results,
    options: Options,
    *,
    jobs: int,
    report: Report,
    target: Callable[[Work, Options, Connection], None] = _process,
) -> None:
    """Do the work, each row in a process of its own.

    A run that fails is stored with its error and ends its row; the other rows go on.

    Args:
      left: the work to do.
      results: the outcomes are stored here.
      options: options of the rows' processes.
      jobs: how many rows run at a time.
      report: called with a line for each outcome.
      target: what a row's process does.
    """
    options.workdir.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    waiting, running = list(left), {}
    try:
        while True:
            while waiting and len(running) < jobs and time.time() <= options.deadline:
                work = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=target, args=(work, options, theirs))
                process.start()
                theirs.close()
                running[ours] = process, work, list(work.runs)
            if not running:
                return
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                process, work, runs = running[connection]
                try:
                    outcome = connection.recv()
                    ended = outcome is None
                except EOFError:
                    process.join()
                    log = options.workdir / f"{work.row}.log"
                    stopped = process.exitcode == 0
                    error = f"its process ended with exit code {process.exitcode}; see {log}"
                    outcome, ended = None if stopped else {"error": error}, True
                if outcome is not None:
                    settings = runs.pop(0)
                    results.add(Run(work.row, settings, outcome))
                    report(f"{work.row}, seed {settings.seed}: {outcome_line(outcome)}")
                if ended:
                    process.join()
                    del running[connection]
    except KeyboardInterrupt:
        # The terminal has stopped the rows too, and they save their state; a second signal would cut that off.
        for process, *_ in running.values():
            process.join()
        raise
    finally:
        for process, *_ in running.values():
            process.terminate()


def outcome_line(outcome: dict[str, Any]) -> str:
    """A run's outcome in one line."""
    if "error" in outcome:
        return f"failed: {outcome['error']}"
    setting, values = next(iter(outcome["metrics"].items()))
    return f"{setting} Rank-1 {values['rank1']:.1f} % mAP {values['mAP']:.1f} % in {outcome['seconds']:.0f} s"
