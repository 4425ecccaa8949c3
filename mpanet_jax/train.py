"""The training loop, and nothing else."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.data.cache import CACHE_MODES, choose_cache, open_cache
from mpanet_jax.data.pipeline import TrainFeed, train_feed
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import UserError
from mpanet_jax.evaluation.evaluate import write_metrics
from mpanet_jax.evaluation.workdir import METRICS_FILES, embed_split, evaluate_split, make_embed
from mpanet_jax.experiment import (
    cache_dir,
    check_config,
    check_same_run,
    initial_variables,
    load_split,
    make_augment_settings,
    make_loss_settings,
    make_model,
    make_optimizer,
    make_schedules,
    random_keys,
    save_config,
)
from mpanet_jax.metric_log import MetricLog
from mpanet_jax.parallel import Parallel, all_devices, global_num_ids, on_first_device
from mpanet_jax.processes import check_same_workdir, gather, is_first_process, wait_for_all_processes
from mpanet_jax.state import TrainState, create_train_state
from mpanet_jax.step import train_steps


def make_feed(config: ConfigDict, split: Split, parallel: Parallel, num_ids_per_batch: int) -> TrainFeed:
    """The batches of the whole run, of which this process gets its share; `num_ids_per_batch` is P of them all."""
    num_bytes = len(split) * config.data.height * config.data.width * 3
    built = open_cache(split, config.data.height, config.data.width, cache_dir(config)) is not None
    chosen = choose_cache(config.data.cache, num_bytes, cache_dir(config), built=built)
    # All processes run the same program, so the one with least room decides.
    cache = CACHE_MODES[max(gather(CACHE_MODES.index(chosen), "the choice of config.data.cache"))]
    if cache != chosen and is_first_process():
        print(f"images: cache={cache}, for another process has less room", file=sys.stderr)
    return train_feed(
        split,
        height=config.data.height,
        width=config.data.width,
        num_ids_per_batch=num_ids_per_batch,
        images_per_id=config.data.images_per_id,
        seed=config.seed,
        num_epochs=config.train.num_epochs,
        cache=cache,
        cache_dir=cache_dir(config),
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        put_images=parallel.replicate,
    )


def initial_state(config: ConfigDict, variables: dict[str, Any], steps_per_epoch: int) -> TrainState:
    """The state before step 0, from `initial_variables`."""
    _, run_key = random_keys(config)
    learning_rate, _ = make_schedules(config, steps_per_epoch)
    optimizer = make_optimizer(config, learning_rate)
    # One program instead of one for every shape of Adam's zeros.
    create = jax.jit(lambda v, key: create_train_state(v["params"], v["batch_stats"], optimizer, key))
    return create(variables, run_key)


def make_train_steps(config: ConfigDict, num_ids: int, steps_per_epoch: int, parallel: Parallel) -> Any:
    """(state, stacked batches, image_cache) → (state, stacked metrics), compiled; the state is donated."""
    learning_rate, mean_rate = make_schedules(config, steps_per_epoch)
    steps = partial(
        train_steps,
        model=make_model(config, num_ids, parallel.axis_name),
        optimizer=make_optimizer(config, learning_rate),
        learning_rate=learning_rate,
        mean_rate=mean_rate,
        loss_settings=make_loss_settings(config),
        augment_settings=make_augment_settings(config),
        images_per_id=config.data.images_per_id,
        axis_name=parallel.axis_name,
    )
    return parallel.map_steps(steps, on_compiled=partial(wait_for_all_processes, "the first call of the compiled step"))


def train(
    config: ConfigDict, workdir: Path, *, on_steps: Callable[[int, float], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Trains by `config` on all devices, resuming from the newest checkpoint under `workdir`, and evaluates.

    Writes config.json, checkpoints/, logs/ and, at the end, metrics.json; with config.eval.best also checkpoints_best/
    and metrics_best.json.

    Args:
      config: the run.
      workdir: its folder.
      on_steps: told the steps done whenever the device has finished some more, and when that was by
        `time.perf_counter`; what it raises ends the run.

    Returns:
      The final metrics by setting (`sysu/all/single`, …).

    Raises:
      UserError: something in the config or the data needs the user, and nothing has been written then; or the loss is
        not finite any more.
    """
    check_config(config)
    parallel = all_devices(config.parallel)
    num_ids_per_batch = global_num_ids(config.data.num_ids_per_batch, parallel.num_devices, config.batch_scale)
    train_split, test_split = load_split(config, "train"), load_split(config, "test")
    # Before the feed: weights that cannot be had should not cost the time of building a cache first.
    variables = initial_variables(config, train_split.num_ids)
    feed = make_feed(config, train_split, parallel, num_ids_per_batch)
    state = parallel.replicate(initial_state(config, variables, feed.steps_per_epoch))
    run_steps = make_train_steps(config, train_split.num_ids, feed.steps_per_epoch, parallel)
    make_embedder = make_embed(make_model(config, train_split.num_ids))

    def evaluate(state: TrainState) -> dict[str, dict[str, Any]]:
        variables = on_first_device({"params": state.params, "batch_stats": state.batch_stats})
        results = evaluate_split(config, *embed_split(config, test_split, make_embedder(variables)))
        wait_for_all_processes("the end of an evaluation")
        return results

    total_steps = feed.steps_per_epoch * config.train.num_epochs
    checkpoint_every = config.train.checkpoint_every_epochs * feed.steps_per_epoch
    evaluate_every = config.train.eval_every_epochs * feed.steps_per_epoch
    steps_per_call = 1 if feed.images is None else config.train.steps_per_call
    check_same_workdir(workdir)
    with Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        first_step = 0
        if checkpoints.latest_step is not None:
            check_same_run(config, workdir)
            state = checkpoints.restore(state, feed.batches)
            first_step = int(state.step)
        # After the restore: a config that does not fit the checkpoint must not replace the one that does.
        if is_first_process():
            save_config(config, workdir)
        with MetricLog(workdir, total_steps, first_step, active=is_first_process()) as log:
            batch_size = num_ids_per_batch * config.data.images_per_id
            every = config.train.log_every_steps
            reader = _MetricReader(log, every, feed.steps_per_epoch, batch_size, on_steps)
            for before, step in calls(first_step, total_steps, steps_per_call, (checkpoint_every, evaluate_every)):
                state, metrics = run_steps(state, stack_batches(feed.batches, step - before), feed.images)
                # The call before this one is read after this one was sent off: the device always has work.
                reader.read_previous(before, step, metrics)
                if step == total_steps or (checkpoint_every and step % checkpoint_every == 0):
                    reader.finish()  # a diverged state must not take the place of the last good one
                    checkpoints.save(step, state, feed.batches)
                if evaluate_every and step % evaluate_every == 0 and step != total_steps:
                    reader.finish()
                    results = evaluate(state)
                    _log_evaluation(log, step, results)
                    keep_best(workdir, config.eval.best, step, results, state, feed.batches)
                    reader.restart_timer(step)
            reader.finish()
            results = evaluate(state)
            _log_evaluation(log, total_steps, results)
            keep_best(workdir, config.eval.best, total_steps, results, state, feed.batches)
    feed.batches.close()
    results = _of_checkpoint(results, "last", total_steps)
    if is_first_process():
        write_metrics(workdir / METRICS_FILES["last"], results)
    wait_for_all_processes("the end of the run")
    return results


def keep_best(workdir: Path, figure: str, step: int, results: Any, state: TrainState, batches: Any) -> None:
    """Saves `state` as the best checkpoint if its `figure` ('rank1', 'mAP', …; '': never) beats the best before.

    The figure is that of the protocol's first setting. The record is metrics_best.json, which a resumed run reads.
    """
    if not figure:
        return
    record = workdir / METRICS_FILES["best"]
    setting = next(iter(results))
    better = not record.exists() or json.loads(record.read_text())[setting][figure] < results[setting][figure]
    # All save, or none: process 0 decides, as the others may see an older record.
    if not gather(int(better), "the choice of the best checkpoint")[0]:
        return
    with Checkpoints(workdir, keep=1, which="best") as checkpoints:
        # It is there where the run was killed before it wrote the record, or evaluates the same step again.
        if not gather(int(checkpoints.latest_step == step), "the best checkpoint")[0]:
            checkpoints.save(step, state, batches)
            checkpoints.wait()
    if is_first_process():
        write_metrics(record, _of_checkpoint(results, "best", step))


def _of_checkpoint(results: dict[str, dict[str, Any]], which: str, step: int) -> dict[str, dict[str, Any]]:
    return {name: {**values, "checkpoint": which, "step": step} for name, values in results.items()}


def calls(first_step: int, total_steps: int, steps_per_call: int, stops: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """How the steps are cut into calls: pairs (steps done before the call, steps done after it).

    No call runs past the end or past a multiple of one of the `stops` (0: none). The most that a call can take is
    `steps_per_call` or, if that is less, the shortest way between two stops of a kind. All calls have one length, the
    largest up to that which divides end and stops, so one program is compiled. Where that is less than a third of the
    most, calls take the most, and one step where so many do not fit: two programs. What a call holds depends on its
    place alone, so a run resumed at a stop goes on with the same programs.
    """
    stops = (total_steps, *(every for every in stops if every))
    at_most = min(steps_per_call, *stops)
    even = max(n for n in range(1, at_most + 1) if math.gcd(*stops) % n == 0)
    length = even if 1 < even >= at_most / 3 else at_most
    step = first_step
    while step < total_steps:
        limit = min(total_steps, *(step // every * every + every for every in stops))
        after = step + (length if step + length <= limit else 1)
        yield step, after
        step = after


def stack_batches(batches: Iterator[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """The next `count` batches, stacked."""
    taken = [next(batches) for _ in range(count)]
    if count == 1:  # without a copy of the images
        return {name: rows[None] for name, rows in taken[0].items()}
    return {name: np.stack([batch[name] for batch in taken]) for name in taken[0]}


def time_when_ready(array: Any) -> float:
    """Waits for the array, and returns when it was there by `time.perf_counter`."""
    jax.block_until_ready(array)
    return time.perf_counter()


class _MetricReader:
    """Reads a call's metrics while the next call is under way, and logs every `every`-th step of them."""

    def __init__(
        self,
        log: MetricLog,
        every: int,
        steps_per_epoch: int,
        batch_size: int,
        on_steps: Callable[[int, float], None] | None = None,
    ):
        self._log, self._every, self._on_steps = log, every, on_steps
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._unread = None
        self._timed = None  # what was read last: the step, and when the device had finished it
        # Sending a call off may take until the device is nearly through with it, and the call before is read after
        # that: late by as long as this one takes, which may be of one step or of many.
        self._clock = ThreadPoolExecutor(1)

    def read_previous(self, before: int, after: int, metrics: Any) -> None:
        """Reads what was handed in last, and keeps the metrics of the steps before+1 … after for the next time."""
        moment = self._clock.submit(time_when_ready, metrics["loss"])
        self.finish()
        self._unread = (before, after, metrics, moment)

    def finish(self) -> None:
        """Reads what was handed in last."""
        if self._unread is None:
            return
        before, after, metrics, moment = self._unread
        self._unread, finished_at = None, moment.result()
        losses = jax.device_get(metrics["loss"])
        if not np.isfinite(losses).all():
            step = before + 1 + int(np.isfinite(losses).argmin())
            raise UserError(
                f"step {step}: the loss is {losses[step - before - 1]}; lower config.optim.learning_rate, or check the "
                "weights of config.init_from; the run stops, its last checkpoint is from before"
            )
        self._log.advance(after)
        if self._on_steps is not None:
            self._on_steps(after, finished_at)
        logged = [step for step in range(before + 1, after + 1) if step % self._every == 0]
        if logged:
            metrics, rate = jax.device_get(metrics), self._images_per_second(after, finished_at)
        for step in logged:
            self._write(step, {name: float(value[step - before - 1]) for name, value in metrics.items()}, rate)

    def restart_timer(self, step: int) -> None:
        """Leaves the time until now out of the images a second; after `finish`."""
        self._timed = (step, time.perf_counter())

    def _images_per_second(self, step: int, finished_at: float) -> float | None:
        rate = None
        if self._timed is not None:
            rate = (step - self._timed[0]) * self._batch_size / (finished_at - self._timed[1])
        self._timed = (step, finished_at)
        return rate

    def _write(self, step: int, values: dict[str, float], rate: float | None) -> None:
        scalars = {f"train/{name}": value for name, value in values.items()}
        if rate is not None:
            scalars["train/images_per_second"] = rate
        epoch = step / self._steps_per_epoch
        self._log.scalars(step, {**scalars, "train/epoch": epoch})
        speed = "" if rate is None else f" {rate:.0f} images/s"
        self._log.status(
            f"step {step} epoch {epoch:.1f} loss {values['loss']:.3f} accuracy {values['accuracy']:.2f}{speed}"
        )


def _log_evaluation(log: MetricLog, step: int, results: dict[str, dict[str, Any]]) -> None:
    for setting, values in results.items():
        log.scalars(step, {f"eval/{setting}/{name}": values[name] for name in ("rank1", "mAP", "mINP")})
    setting, values = next(iter(results.items()))
    log.status(f"step {step} {setting}: Rank-1 {values['rank1']:.1f} % mAP {values['mAP']:.1f} %")
