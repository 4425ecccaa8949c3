"""The training loop, and nothing else."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mpanet_jax.checkpoint import Checkpoints
from mpanet_jax.data.pipeline import TrainFeed, train_feed
from mpanet_jax.datasets.schema import Split
from mpanet_jax.evaluation.evaluate import write_metrics
from mpanet_jax.evaluation.workdir import embed_split, evaluate_split, make_embed
from mpanet_jax.experiment import (
    cache_dir,
    check_config,
    load_split,
    make_augment_settings,
    make_loss_settings,
    make_model,
    make_optimizer,
    make_schedules,
    save_config,
)
from mpanet_jax.metric_log import MetricLog
from mpanet_jax.state import TrainState, create_train_state, init_variables
from mpanet_jax.step import train_step

METRICS_FILE = "metrics.json"


def make_feed(config: ConfigDict, split: Split) -> TrainFeed:
    """The batches of the whole run."""
    return train_feed(
        split,
        height=config.data.height,
        width=config.data.width,
        num_ids_per_batch=config.data.num_ids_per_batch,
        images_per_id=config.data.images_per_id,
        seed=config.seed,
        num_epochs=config.train.num_epochs,
        cache=config.data.cache,
        cache_dir=cache_dir(config),
        num_workers=config.data.num_workers,
    )


def initial_state(config: ConfigDict, num_ids: int, steps_per_epoch: int) -> TrainState:
    """The state before step 0, with the backbone of config.init_from where one is named."""
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    model = make_model(config, num_ids)
    variables = init_variables(model, init_key, config.data.height, config.data.width)
    params, batch_stats = variables["params"], variables["batch_stats"]
    if config.init_from:
        from mpanet_jax import weights

        params, batch_stats = weights.load_backbone(config.init_from, params, batch_stats)
    learning_rate, _ = make_schedules(config, steps_per_epoch)
    return create_train_state(params, batch_stats, make_optimizer(config, learning_rate), run_key)


def make_train_step(config: ConfigDict, num_ids: int, steps_per_epoch: int) -> Any:
    """(state, batch, image_cache) → (state, metrics), compiled; the state is donated."""
    learning_rate, mean_rate = make_schedules(config, steps_per_epoch)
    step = partial(
        train_step,
        model=make_model(config, num_ids),
        optimizer=make_optimizer(config, learning_rate),
        learning_rate=learning_rate,
        mean_rate=mean_rate,
        loss_settings=make_loss_settings(config),
        augment_settings=make_augment_settings(config),
        images_per_id=config.data.images_per_id,
    )
    return jax.jit(step, donate_argnums=0)


def train(config: ConfigDict, workdir: Path) -> dict[str, dict[str, Any]]:
    """Trains by `config`, resuming from the newest checkpoint under `workdir`, and evaluates.

    Writes config.json, checkpoints/, logs/ and, at the end, metrics.json.

    Returns:
      The final metrics by setting (`sysu/all/single`, …).

    Raises:
      UserError: something in the config or the data needs the user; nothing has been written then.
    """
    check_config(config)
    train_split, test_split = load_split(config, "train"), load_split(config, "test")
    feed = make_feed(config, train_split)
    state = initial_state(config, train_split.num_ids, feed.steps_per_epoch)
    step_fn = make_train_step(config, train_split.num_ids, feed.steps_per_epoch)
    embed = make_embed(make_model(config, train_split.num_ids))

    def evaluate(state: TrainState) -> dict[str, dict[str, Any]]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return evaluate_split(config, *embed_split(config, test_split, embed, variables))

    total_steps = feed.steps_per_epoch * config.train.num_epochs
    checkpoint_every = config.train.checkpoint_every_epochs * feed.steps_per_epoch
    evaluate_every = config.train.eval_every_epochs * feed.steps_per_epoch
    with Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        first_step = 0
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state, feed.batches)
            first_step = int(state.step)
        # After the restore: a config that does not fit the checkpoint must not replace the one that does.
        save_config(config, workdir)
        with MetricLog(workdir, total_steps, first_step) as log:
            timer = _StepTimer(config.data.num_ids_per_batch * config.data.images_per_id)
            previous = None
            for step in range(first_step + 1, total_steps + 1):
                state, metrics = step_fn(state, next(feed.batches), feed.images)
                # Step n−1 is read after step n was sent off: the device always has work.
                if previous is not None and (step - 1) % config.train.log_every_steps == 0:
                    _log_step(log, step - 1, previous, feed.steps_per_epoch, timer)
                previous = metrics
                log.advance(step)
                if step == total_steps or (checkpoint_every and step % checkpoint_every == 0):
                    checkpoints.save(step, state, feed.batches)
                if evaluate_every and step % evaluate_every == 0 and step != total_steps:
                    results = evaluate(state)
                    _log_evaluation(log, step, results)
                    timer.restart(step)
            results = evaluate(state)
            _log_evaluation(log, total_steps, results)
    results = {name: {**values, "checkpoint": "last", "step": total_steps} for name, values in results.items()}
    write_metrics(workdir / METRICS_FILE, results)
    return results


class _StepTimer:
    """Images a second between two readings."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._last = None

    def restart(self, step: int) -> None:
        self._last = (step, time.perf_counter())

    def images_per_second(self, step: int) -> float | None:
        now = time.perf_counter()
        rate = None
        if self._last is not None and step > self._last[0]:
            rate = (step - self._last[0]) * self._batch_size / (now - self._last[1])
        self._last = (step, now)
        return rate


def _log_step(log: MetricLog, step: int, metrics: Any, steps_per_epoch: int, timer: _StepTimer) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    rate = timer.images_per_second(step)
    if not np.isfinite(values["loss"]):
        log.status(f"step {step}: the loss is {values['loss']}")
    scalars = {f"train/{name}": value for name, value in values.items()}
    if rate is not None:
        scalars["train/images_per_second"] = rate
    log.scalars(step, {**scalars, "train/epoch": step / steps_per_epoch})
    speed = "" if rate is None else f" {rate:.0f} images/s"
    log.status(
        f"step {step} epoch {step / steps_per_epoch:.1f} loss {values['loss']:.3f} "
        f"accuracy {values['accuracy']:.2f}{speed}"
    )


def _log_evaluation(log: MetricLog, step: int, results: dict[str, dict[str, Any]]) -> None:
    for setting, values in results.items():
        log.scalars(step, {f"eval/{setting}/{name}": values[name] for name in ("rank1", "mAP", "mINP")})
    setting, values = next(iter(results.items()))
    log.status(f"step {step} {setting}: Rank-1 {values['rank1']:.1f} % mAP {values['mAP']:.1f} %")
