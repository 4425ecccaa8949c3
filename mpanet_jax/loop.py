"""The training loop: from settings to a trained, evaluated run."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mpanet_jax import datasets
from mpanet_jax.call_plan import cut_into_calls, stack_batches
from mpanet_jax.checkpoint import Checkpoints, has_checkpoint, is_finite
from mpanet_jax.data.pipeline import TrainFeed, train_feed
from mpanet_jax.data.record_check import RecordCheck
from mpanet_jax.datasets.schema import Split
from mpanet_jax.errors import Stopped
from mpanet_jax.evaluation.best import keep_best
from mpanet_jax.evaluation.evaluate import write_metrics
from mpanet_jax.evaluation.extract import Embed, make_embed
from mpanet_jax.evaluation.workdir import evaluate_set, of_checkpoint
from mpanet_jax.log_pictures import LogPictures
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import Method
from mpanet_jax.metric_log import MetricLog, MetricReader
from mpanet_jax.nonfinite import FiniteCheck
from mpanet_jax.parallel import Parallel, all_devices, global_num_ids, on_first_device
from mpanet_jax.processes import check_same_workdir, is_first_process, raise_lost_process, wait_for_all_processes
from mpanet_jax.run_files import METRICS_FILES, check_init_from, check_same_run, save_settings
from mpanet_jax.settings import Settings, replace
from mpanet_jax.state import TrainState, create_train_state, random_keys
from mpanet_jax.step import train_steps
from mpanet_jax.stop import StopRequest
from mpanet_jax.weights.convert import initial_variables
from mpanet_jax.workdir_lock import locked_workdir

SAVED = "stopped at step {}, saved; start again with the same command"


def make_feed(method: Method, split: Split, parallel: Parallel) -> TrainFeed:
    """The batches of the whole run, of which this process gets its share."""
    settings = method.settings
    num_ids = global_num_ids(settings.data.num_ids_per_batch, parallel.num_devices, settings.batch_scale)
    plan = method.batch_plan(split.pids, split.modality, num_ids)
    if plan.num_resampled and is_first_process():
        print(
            f"batches: {plan.num_resampled} of {split.num_ids} identities have fewer than K/2 = "
            f"{plan.images_per_id // 2} images in a modality; theirs are drawn with replacement",
            file=sys.stderr,
        )
    return train_feed(
        split,
        plan,
        settings.data,
        num_epochs=settings.train.num_epochs,
        cache_dir=Path(settings.dataset.data_dir) / "cache",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        put_images=parallel.replicate,
    )


def start_of_run(method: Method, num_ids: int, workdir: Path) -> dict[str, Any]:
    """{params, batch_stats} before step 0; only their shapes count where a checkpoint of the run follows."""
    if has_checkpoint(workdir):  # the weights of init_from may be gone by now
        method = make_method(replace(method.settings, {"init_from": ""}))

    def report(line: str) -> None:
        if is_first_process():
            print(line, file=sys.stderr, flush=True)

    return initial_variables(method, num_ids, report=report)


def initial_state(method: Method, variables: dict[str, Any], steps_per_epoch: int) -> TrainState:
    """The state before step 0, from `initial_variables`."""
    _, run_key = random_keys(method.settings.seed)
    optimizer = method.optimizer(method.learning_rate(steps_per_epoch))
    # One program instead of one for every shape of Adam's zeros.
    create = jax.jit(lambda v, key: create_train_state(v, method.averaged(v["params"]), optimizer, key))
    return create(variables, run_key)


def make_train_steps(
    method: Method,
    num_ids: int,
    steps_per_epoch: int,
    parallel: Parallel,
    compiler_options: dict[str, str | bool] | None = None,
) -> Any:
    """(state, stacked batches, image_cache) → (state, stacked metrics), compiled; the state is donated."""
    axis_name = parallel.axis_name
    network = method.build(num_ids, axis_name)
    options = {"method": method, "network": network, "steps_per_epoch": steps_per_epoch, "axis_name": axis_name}
    steps = partial(train_steps, **options)
    wait = partial(wait_for_all_processes, "the first call of the compiled step")
    return parallel.map_steps(steps, on_compiled=wait, compiler_options=compiler_options)


class Programs:
    """The compiled programs of a run, which the runs after it share that differ from it in their seed alone."""

    def __init__(self):
        self._key = self._made = None

    def of(
        self, method: Method, num_ids: int, steps_per_epoch: int, parallel: Parallel
    ) -> tuple[Any, Callable[[Any], Embed]]:
        """`make_train_steps` and `make_embed` of a run; of the run before, where they are the same."""
        key = (replace(method.settings, {"seed": 0}), num_ids, steps_per_epoch, parallel)
        if key != self._key:
            made = make_train_steps(method, num_ids, steps_per_epoch, parallel), make_embed(method, num_ids)
            self._key, self._made = key, made
        assert self._made is not None
        return self._made


def train(
    settings: Settings,
    workdir: str | Path,
    *,
    feed: TrainFeed | None = None,
    on_steps: Callable[[int, float], None] | None = None,
    programs: Programs | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains by `settings` on all devices, resuming from the newest checkpoint under `workdir`, and evaluates.

    Writes config.json, checkpoints/, logs/ and, at the end, metrics.json; with settings.eval.best also
    checkpoints_best/ and metrics_best.json, or with settings.dataset.validation metrics_best_validation.json.

    Args:
      settings: the run.
      workdir: its folder.
      feed: its `make_feed`, where the caller has made it already; it is closed at the end.
      on_steps: told the steps done whenever the device has finished some more, and when that was by
        `time.perf_counter`; what it raises ends the run.
      programs: of runs before this one.

    Returns:
      The final metrics by setting of the protocol (`sysu/all/single`, …).

    Raises:
      UserError: something in the settings or the data needs the user, and nothing has been written then; or the loss is
        not finite any more.
      Stopped: SIGTERM or Ctrl-C; the steps done are saved.
    """
    try:
        with StopRequest() as stop:
            return _train(settings, Path(workdir), feed, on_steps, programs or Programs(), stop)
    except jax.errors.JaxRuntimeError as error:
        raise_lost_process(error)
        raise


def _train(
    settings: Settings,
    workdir: Path,
    feed: TrainFeed | None,
    on_steps: Callable[[int, float], None] | None,
    programs: Programs,
    stop: StopRequest,
) -> dict[str, dict[str, Any]]:
    method = make_method(settings)
    method.check_form()  # before anything is written
    check_init_from(settings.init_from, workdir)
    parallel = all_devices(settings.parallel)
    train_split = datasets.open_split(settings.dataset, "train")
    test_set = datasets.open_evaluation(settings.dataset)
    validation = settings.dataset.validation
    watched = datasets.open_evaluation(settings.dataset, validation=True) if validation else test_set
    # Before the feed: weights that cannot be had should not cost the time of building a cache first.
    variables = start_of_run(method, train_split.num_ids, workdir)
    feed = feed or make_feed(method, train_split, parallel)
    test_records = RecordCheck(test_set.split)
    steps_per_epoch = feed.steps_per_epoch
    state = parallel.replicate(initial_state(method, variables, steps_per_epoch))
    run_steps, make_embedder = programs.of(method, train_split.num_ids, steps_per_epoch, parallel)

    def evaluate(
        step: int, state: TrainState, tested: datasets.EvaluationSet, pictures: LogPictures | None = None
    ) -> dict[str, dict[str, Any]]:
        variables = on_first_device({"params": state.params, "batch_stats": state.batch_stats})
        embed = make_embedder(variables)

        def embed_unless_stopped(images: Any, modality: Any = None) -> Any:
            if stop.interrupts_work_of_one():
                raise stop.stopped(SAVED.format(step))
            return embed(images, modality)

        shows = None if pictures is None else partial(pictures.write, step, variables)
        results = evaluate_set(settings, tested, embed_unless_stopped, on_embeddings=shows)
        wait_for_all_processes("the end of an evaluation")
        return results

    total_steps = steps_per_epoch * settings.train.num_epochs
    checkpoint_every = settings.train.checkpoint_every_epochs * steps_per_epoch
    evaluate_every = settings.train.eval_every_epochs * steps_per_epoch
    steps_per_call = 1 if feed.images is None else settings.train.steps_per_call
    check_same_workdir(workdir)
    with locked_workdir(workdir), Checkpoints(workdir, settings.train.keep_checkpoints) as checkpoints:
        first_step = 0
        if checkpoints.latest_step is not None:
            check_same_run(settings, workdir)
            state = checkpoints.restore(state, feed.batches)
            first_step = int(state.step)
        # After the restore: settings that do not fit the checkpoint must not replace those that do.
        if is_first_process():
            save_settings(settings, workdir)
        with MetricLog(workdir, total_steps, first_step, active=is_first_process()) as log:
            finite = FiniteCheck(
                settings.train.on_nonfinite,
                workdir,
                lambda step: train_split.paths[feed.rows(step - 1)],
                writes=is_first_process(),
            )
            reader = MetricReader(
                log, settings.train.log_every_steps, steps_per_epoch, feed.batch_size, on_steps, finite
            )

            def save(step: int) -> None:
                # What diverged, or comes from damaged images, must not take the place of the last good state; and a run
                # that could not be evaluated should say so before it has trained for long.
                reader.finish()
                feed.require_sound_images()
                test_records.require()
                if not is_finite((state.params, state.batch_stats, state.opt_state)):
                    raise finite.error(step, "the weights are not finite any more", {})
                checkpoints.save(step, state, feed.batches)

            pictures = LogPictures(log, method, train_split, feed.rows, watched.split) if is_first_process() else None

            def watch(step: int) -> dict[str, dict[str, Any]]:
                results = evaluate(step, state, watched, pictures)
                log.evaluation(step, results)
                keep_best(workdir, settings.eval.best, step, results, state, feed.batches, validation=validation)
                return results

            def watch_during_training(step: int) -> None:
                reader.finish()
                with contextlib.suppress(Stopped):  # the state is saved then, and evaluated when the run goes on
                    watch(step)
                reader.restart_timer(step)

            def is_due(every: int, step: int) -> bool:
                return bool(every) and step % every == 0

            stop.defer()
            # A run that was stopped in this evaluation, or killed, has yet to finish it.
            if first_step and first_step != total_steps and is_due(evaluate_every, first_step):
                watch_during_training(first_step)
            stops = (checkpoint_every, evaluate_every)
            for before, step in cut_into_calls(first_step, total_steps, steps_per_call, stops):
                state, metrics = run_steps(state, stack_batches(feed.batches, step - before), feed.images)
                # The call before this one is read after this one was sent off: the device always has work.
                reader.read_previous(before, step, metrics)
                checkpoints.raise_failure()
                saves = step == total_steps or is_due(checkpoint_every, step)
                if saves:
                    save(step)
                watches = step != total_steps and is_due(evaluate_every, step)
                if watches:
                    watch_during_training(step)
                if step != total_steps and stop.agreed(before, step, ask=watches):
                    if not saves:
                        save(step)
                    checkpoints.wait()
                    raise stop.stopped(SAVED.format(step))
            reader.finish()
            results = watch(total_steps)
            if validation:
                results = evaluate(total_steps, state, test_set)
    feed.batches.close()
    results = of_checkpoint(results, "last", total_steps)
    if is_first_process():
        write_metrics(workdir / METRICS_FILES["last"], results)
    wait_for_all_processes("the end of the run")
    return results
