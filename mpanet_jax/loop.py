"""The training loop: from settings to a trained, evaluated run."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mpanet_jax import datasets
from mpanet_jax.background import InBackground
from mpanet_jax.call_plan import CallBatches, cut_into_calls, most_steps_of_a_call
from mpanet_jax.checkpoint import Checkpoints, latest_step
from mpanet_jax.checkpoint_check import is_finite
from mpanet_jax.compilation import end_start
from mpanet_jax.data.pipeline import TrainFeed
from mpanet_jax.data.record_check import RecordCheck
from mpanet_jax.device_resize import DeviceResize
from mpanet_jax.errors import Stopped, leaves_at_once
from mpanet_jax.evaluation.best import check_best, keep_best
from mpanet_jax.evaluation.metrics_output import write_metrics
from mpanet_jax.evaluation.workdir import evaluate_set, with_checkpoint
from mpanet_jax.log_pictures import LogPictures
from mpanet_jax.methods import make_method
from mpanet_jax.metric_log import MetricLog, MetricReader
from mpanet_jax.nonfinite import FiniteCheck
from mpanet_jax.parallel import all_devices, on_first_device
from mpanet_jax.processes import check_same_workdir, is_first_process, raise_lost_process, wait_for_all_processes
from mpanet_jax.run_files import METRICS_FILES, check_init_from, check_same_run, save_settings
from mpanet_jax.run_setup import (
    Programs,
    initial_state,
    lower_steps,
    make_feed,
    starting_variables,
    state_shapes,
)
from mpanet_jax.settings import Settings
from mpanet_jax.stop import StopRequest
from mpanet_jax.workdir_lock import locked_workdir

SAVED = "stopped at step {}, saved; start again with the same command"

Results = dict[str, dict[str, Any]]  # the metrics by setting of the protocol


def train(
    settings: Settings,
    workdir: str | Path,
    *,
    feed: TrainFeed | None = None,
    on_steps: Callable[[int, float], None] | None = None,
    programs: Programs | None = None,
) -> Results:
    """Trains on all devices and evaluates; goes on from the newest checkpoint in `workdir`, if there is one.

    Writes config.json, checkpoints/, logs/ and, at the end, metrics.json. With settings.eval.best it also writes
    checkpoints_best/ and metrics_best.json; with settings.dataset.validation the latter is called
    metrics_best_validation.json.

    Args:
      settings: the recipe and the data.
      workdir: the run's folder; it is made if need be.
      feed: the run's `make_feed`, if the caller has made it; it is closed at the end.
      on_steps: called with the number of steps that the device has finished, and the time by `time.perf_counter` when
        it had; an exception of its ends the run.
      programs: the compiled programs of the run before, to use them again.

    Returns:
      The final metrics, {setting of the protocol ('sysu/all/single', …): {figure: value}}.

    Raises:
      UserError: the settings or the data are wrong (then nothing has been written), or the loss is not finite any more.
      Stopped: SIGTERM or Ctrl-C has come; the steps done are saved.
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
) -> Results:
    with contextlib.ExitStack() as ends:
        run = _Run(settings, workdir, feed, programs, stop, ends)
        check_same_workdir(workdir)
        ends.enter_context(locked_workdir(workdir))
        checkpoints = ends.enter_context(Checkpoints(workdir, settings.train.keep_checkpoints))
        first_step = run.resume(checkpoints)
        # Only now: settings that do not fit the checkpoint must not replace those that do.
        if is_first_process():
            save_settings(settings, workdir)
        with (
            contextlib.closing(CallBatches(run.feed.batches, run.make_ready, run.calls(first_step))) as calls,
            MetricLog(workdir, run.total_steps, first_step, active=is_first_process()) as log,
        ):
            training = _Training(run, checkpoints, log, on_steps, calls)
            training.train(first_step)
            results = training.final_results()
    results = with_checkpoint(results, "last", run.total_steps)
    if is_first_process():
        write_metrics(workdir / METRICS_FILES["last"], results)
    wait_for_all_processes("the end of the run")
    return results


class _Run:
    """A run that is ready to start: data, state and compiled programs. Making one writes nothing into the workdir.

    Attributes:
      train_split: the training images.
      test_set: the test set.
      watched_set: what is evaluated during training: the test set, or the validation identities.
      evaluated_records: the check of the records that evaluations read, in the background once it is started.
      state: after the steps done so far.
      run_steps: `make_train_steps`.
      compiled: their compilation, under way.
      images: the feed's, on the devices.
      make_ready: of stacked batches what `run_steps` takes.
      checkpoint_every, evaluate_every: in steps; 0: only at the end.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: Path,
        feed: TrainFeed | None,
        programs: Programs,
        stop: StopRequest,
        ends: contextlib.ExitStack,  # closes the batches, however the run ends
    ):
        self.settings, self.workdir, self.stop = settings, workdir, stop
        self.method = make_method(settings)
        self.method.check_form()
        check_init_from(settings.init_from, workdir)
        check_best(workdir, settings.eval.best, validation=settings.dataset.validation)
        parallel = all_devices(settings.parallel)
        self.train_split = datasets.open_split(settings.dataset, "train")
        self.test_set = datasets.open_evaluation(settings.dataset)
        self.watched_set = self.test_set
        if settings.dataset.validation:
            self.watched_set = datasets.open_evaluation(settings.dataset, validation=True)
        # Before the feed: weights that are missing should be named before a cache is built, which takes long.
        num_ids = self.train_split.num_ids
        make_variables = starting_variables(self.method, num_ids, workdir)
        self.feed = feed or make_feed(self.method, self.train_split, parallel)
        ends.enter_context(contextlib.closing(self.feed.batches))
        if latest_step(workdir) is None:  # else `resume` first restores where they begin
            self.feed.batches.start_processes()
        watched = [self.watched_set.split] if settings.dataset.validation else []
        self.evaluated_records = RecordCheck(self.test_set.split, *watched)
        resize = DeviceResize.of(settings.data, parallel)
        self.make_ready = lambda batches: parallel.put_batches(resize(batches))
        steps_per_epoch = self.feed.steps_per_epoch
        self.total_steps = steps_per_epoch * settings.train.num_epochs
        self.checkpoint_every = steps_per_epoch * settings.train.checkpoint_every_epochs
        self.evaluate_every = steps_per_epoch * settings.train.eval_every_epochs
        self.run_steps, self._make_embedder = programs.for_run(self.method, num_ids, steps_per_epoch, parallel)
        shapes, calls = state_shapes(self.method, num_ids, steps_per_epoch), self.calls(latest_step(workdir) or 0)
        # Tracing keeps Python's lock; compiling, or reading what was compiled, does not.
        compile_steps = lower_steps(self.run_steps, shapes, self.feed, calls, parallel)
        # If the run fails meanwhile, Python waits for the thread at its end, unless a script leaves at once.
        self.compiled = InBackground(compile_steps, cut_off=leaves_at_once())
        self.compiled.start()
        self.state = parallel.replicate(initial_state(self.method, make_variables(), steps_per_epoch))
        self.images = self.feed.images  # if the devices have no room for them, the run ends here

    def calls(self, first_step: int) -> Iterator[tuple[int, int]]:
        """The run's `cut_into_calls`."""
        steps_per_call = most_steps_of_a_call(self.settings.train.steps_per_call, self.feed.sent_bytes)
        stops = (self.checkpoint_every, self.evaluate_every)
        return cut_into_calls(first_step, self.total_steps, steps_per_call, stops)

    def resume(self, checkpoints: Checkpoints) -> int:
        """Restores the newest checkpoint, if there is one; returns how many steps are done."""
        if checkpoints.latest_step is None:
            return 0
        check_same_run(self.settings, self.workdir)
        self.state = checkpoints.restore(self.state, self.feed.batches)
        self.feed.batches.start_processes()
        return int(self.state.step)

    def evaluate(self, step: int, tested: datasets.EvaluationSet, pictures: LogPictures | None = None) -> Results:
        """Evaluates the state, after `step` steps, on a set; writes `pictures` on the way.

        Raises:
          Stopped: a signal has come, and this is the only process.
        """
        variables = on_first_device({"params": self.state.params, "batch_stats": self.state.batch_stats})
        embed = self._make_embedder(variables)

        def embed_unless_stopped(images: Any, modality: Any = None) -> Any:
            if self.stop.may_interrupt_evaluation():
                raise self.stop.stopped(SAVED.format(step))
            return embed(images, modality)

        write_pictures = None if pictures is None else partial(pictures.write, step, variables)
        results = evaluate_set(self.settings, tested, embed_unless_stopped, on_embeddings=write_pictures)
        wait_for_all_processes("the end of an evaluation")
        return results


class _Training:
    """A run under way, with its checkpoints and its log open."""

    def __init__(
        self,
        run: _Run,
        checkpoints: Checkpoints,
        log: MetricLog,
        on_steps: Callable[[int, float], None] | None,
        calls: CallBatches,
    ):
        self._run, self._checkpoints, self._log, self._calls = run, checkpoints, log, calls
        options, feed, split = run.settings.train, run.feed, run.train_split
        self._finite = FiniteCheck(
            options.on_nonfinite,
            run.workdir,
            lambda step: split.paths[feed.rows(step - 1)],
            writes=is_first_process(),
        )
        self._reader = MetricReader(
            log, options.log_every_steps, feed.steps_per_epoch, feed.batch_size, on_steps, self._finite, run.total_steps
        )
        self._pictures = None
        if is_first_process():
            self._pictures = LogPictures(log, run.method, split, feed.rows, run.watched_set.split)

    def train(self, first_step: int) -> None:
        """Trains from `first_step` done steps to the last one; saves and evaluates as the settings say.

        Raises:
          Stopped: a signal has come; the steps done are saved.
        """
        run = self._run
        run.stop.defer()
        if first_step and self._is_evaluation_due(first_step):
            self._evaluate_during_training(first_step)  # the run was stopped or killed before it had finished this
        for before, step, batches in self._calls:
            run.compiled.wait()  # an error of it comes again
            run.state, metrics = run.run_steps(run.state, batches, run.images)
            end_start()
            # Not before the first call: a run's start is mostly Python's work, and others would take its lock.
            run.feed.start_check()
            run.evaluated_records.start()
            # The metrics of the last call are read now, with this call on its way: the device always has work.
            self._reader.read_previous(before, step, metrics)
            self._checkpoints.raise_failure()
            is_last = step == run.total_steps
            saves = is_last or _is_multiple(step, run.checkpoint_every)
            if saves:
                self._save(step)
            evaluates = self._is_evaluation_due(step)
            if evaluates:
                self._evaluate_during_training(step)
            if not is_last and run.stop.agreed(before, step, ask=evaluates):
                if not saves:
                    self._save(step)
                self._checkpoints.wait()
                raise run.stop.stopped(SAVED.format(step))
        self._reader.read_last()

    def final_results(self) -> Results:
        """Evaluates the trained network, and chooses the best checkpoint; returns the metrics of the test set."""
        run = self._run
        results = self._evaluate(run.total_steps)
        return run.evaluate(run.total_steps, run.test_set) if run.settings.dataset.validation else results

    def _save(self, step: int) -> None:
        # A state that diverged, or that has seen damaged images, must not replace the last good one. And if the test
        # images are damaged, the run should say so early.
        self._reader.read_last()
        self._run.feed.require_sound_images()
        self._run.evaluated_records.require()
        state = self._run.state
        if not is_finite((state.params, state.batch_stats, state.opt_state)):
            raise self._finite.error(step, "the weights are not finite any more", {})
        self._checkpoints.save(step, state, self._calls)

    def _is_evaluation_due(self, step: int) -> bool:
        """Whether to evaluate in the middle of training, after `step`; the end has its own evaluation."""
        return step != self._run.total_steps and _is_multiple(step, self._run.evaluate_every)

    def _evaluate_during_training(self, step: int) -> None:
        self._reader.read_last()
        with contextlib.suppress(Stopped):  # the state is saved next, and evaluated when the run goes on
            self._evaluate(step)
        self._reader.restart_timer(step)

    def _evaluate(self, step: int) -> Results:
        end_start()  # a run that is resumed may have no step left
        run, figure = self._run, self._run.settings.eval.best
        results = run.evaluate(step, run.watched_set, self._pictures)
        self._log.evaluation(step, results)
        validation = run.settings.dataset.validation
        keep_best(run.workdir, figure, step, results, run.state, self._calls, validation=validation)
        return results


def _is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at `step`."""
    return bool(every) and step % every == 0
