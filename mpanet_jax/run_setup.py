"""What a run starts from: its batches, its first state and its compiled programs."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mpanet_jax.checkpoint import latest_step
from mpanet_jax.data.pipeline import TrainFeed, train_feed
from mpanet_jax.datasets.schema import Split
from mpanet_jax.evaluation.extract import Embed, make_embed
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import Method
from mpanet_jax.parallel import Parallel, global_num_ids
from mpanet_jax.processes import is_first_process, wait_for_all_processes
from mpanet_jax.settings_base import replace
from mpanet_jax.state import TrainState, create_train_state, random_keys
from mpanet_jax.step import train_steps
from mpanet_jax.weights.convert import read_initial_variables, template_of


def make_feed(method: Method, split: Split, parallel: Parallel) -> TrainFeed:
    """This process's share of the batches of the whole run.

    Args:
      method: plans the batches.
      split: the training images.
      parallel: the devices of all processes.

    Raises:
      UserError: as `train_feed`, or the identities of a batch do not divide over the devices.
    """
    settings = method.settings
    num_ids = global_num_ids(settings.data.num_ids_per_batch, parallel.num_devices, settings.batch_scale)
    plan = method.batch_plan(split.pids, split.modality, num_ids)
    if plan.num_resampled and is_first_process():
        print(
            f"batches: {plan.num_resampled} of {split.num_ids} identities have fewer than K/2 = "
            f"{plan.images_per_id // 2} images in a modality; their images are drawn with replacement",
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


def starting_variables(method: Method, num_ids: int, workdir: Path) -> Callable[[], dict[str, Any]]:
    """Reads init_from; returns what makes the {params, batch_stats} before step 0, which are random or from there.

    They are random if the workdir has a checkpoint: that will replace them, and the weights of init_from may be gone.

    Raises:
      SettingsError: the weights of init_from are not there, or do not fit the network.
    """
    if latest_step(workdir) is not None:
        method = make_method(replace(method.settings, {"init_from": ""}))

    def report(line: str) -> None:
        if is_first_process():
            print(line, file=sys.stderr, flush=True)

    return read_initial_variables(method, num_ids, report=report)


def initial_state(method: Method, variables: dict[str, Any], steps_per_epoch: int) -> TrainState:
    """The state before step 0.

    Args:
      method: its optimiser, its averages and its seed.
      variables: {params, batch_stats}; see `starting_variables`.
      steps_per_epoch: for the learning rate's schedule.
    """
    _, run_key = random_keys(method.settings.seed)
    optimizer = method.optimizer(method.learning_rate(steps_per_epoch))
    # Compiled as one program: otherwise every shape of Adam's zeros would be a program of its own.
    create = jax.jit(lambda v, key: create_train_state(v, method.averaged(v["params"]), optimizer, key))
    return create(variables, run_key)


def make_train_steps(
    method: Method,
    num_ids: int,
    steps_per_epoch: int,
    parallel: Parallel,
    compiler_options: dict[str, str | bool] | None = None,
) -> Any:
    """Compiles `train_steps`: (state, stacked batches, image_cache) → (state, stacked metrics); the state is donated.

    Args:
      method: of the run.
      num_ids: training identities.
      steps_per_epoch: for the schedules.
      parallel: the devices, which share each batch.
      compiler_options: of XLA, for this program alone.
    """
    axis_name = parallel.axis_name
    network = method.build(num_ids, axis_name)
    options = {"method": method, "network": network, "steps_per_epoch": steps_per_epoch, "axis_name": axis_name}
    steps = partial(train_steps, **options)
    wait = partial(wait_for_all_processes, "the first call of the compiled step")
    return parallel.map_steps(steps, on_compiled=wait, compiler_options=compiler_options)


def state_shapes(method: Method, num_ids: int, steps_per_epoch: int) -> TrainState:
    """Shapes and types of the `initial_state`."""
    template = template_of(method, num_ids)
    return jax.eval_shape(partial(initial_state, method, steps_per_epoch=steps_per_epoch), template)


def lower_steps(
    steps: Any, state: TrainState, feed: TrainFeed, calls: Iterator[tuple[int, int]], parallel: Parallel
) -> Callable[[], object]:
    """Traces and lowers `make_train_steps`, as their first call would; returns what compiles them.

    It needs no arrays, so a thread can compile while they are read, drawn and sent; the first call then has the
    program. With several devices nothing is done before that.

    Args:
      steps: the compiled steps.
      state: `state_shapes`.
      feed: of the run.
      calls: of the run, as `cut_into_calls` gives them.
      parallel: the devices.
    """
    before, after = next(calls, (0, 0))
    if before == after or parallel.num_devices > 1:
        return lambda: None
    batches = {
        name: jax.ShapeDtypeStruct((after - before, *shape.shape), shape.dtype) for name, shape in feed.shapes.items()
    }
    return steps.lower(*parallel.replicated_shapes((state, batches, feed.image_set))).compile


class Programs:
    """The compiled programs of one run; a following run that differs in its seed alone uses them again."""

    def __init__(self):
        self._key = self._made = None

    def for_run(
        self, method: Method, num_ids: int, steps_per_epoch: int, parallel: Parallel
    ) -> tuple[Any, Callable[[Any], Embed]]:
        """The `make_train_steps` and the `make_embed` of a run, made anew unless they are those of the last run."""
        key = (replace(method.settings, {"seed": 0}), num_ids, steps_per_epoch, parallel)
        if key != self._key:
            made = make_train_steps(method, num_ids, steps_per_epoch, parallel), make_embed(method, num_ids)
            self._key, self._made = key, made
        assert self._made is not None
        return self._made
