"""Measures the whole training step: augmentation, losses, backward pass, Adam, mean classifiers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from mpanet_jax.errors import UserError, first_line
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import compute_dtype
from mpanet_jax.parallel import Parallel, all_devices, global_num_ids
from mpanet_jax.run_setup import initial_state, make_train_steps
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace
from mpanet_jax.state import init_variables
from mpanet_jax.weights.convert import initial_variables

NUM_IDS = 395  # identities and steps an epoch of SYSU-MM01's training set
STEPS_PER_EPOCH = 183


def random_images(settings: Settings, num_images: int) -> np.ndarray:
    """Random images uint8[N, height, width, 3]; zeros would make an accelerator faster than it really is."""
    shape = (num_images, settings.data.height, settings.data.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@dataclass(frozen=True)
class _Program:
    """A compiled step, of which one call has been made."""

    call: Callable[[], Any]
    steps_per_call: int
    batch_size: int
    num_devices: int
    first_call_seconds: float
    from_cache: int
    first_loss: float


def _compile(
    settings: Settings,
    images: np.ndarray,
    num_ids: int,
    num_devices: int | None,
    compiler_options: dict[str, str | bool] | None,
) -> _Program:
    method = make_method(replace(settings, {"init_from": ""}))
    compiled = measure.CompileLog()
    parallel = _first_devices(settings, num_devices)
    num_ids_per_batch = global_num_ids(settings.data.num_ids_per_batch, parallel.num_devices, settings.batch_scale)
    # On the CPU, training takes one step a call: inside a loop of steps XLA runs convolutions on one thread.
    steps_per_call = 1 if jax.default_backend() == "cpu" else settings.train.steps_per_call
    images_per_id = settings.data.images_per_id
    on_device = parallel.replicate(images.reshape(len(images), settings.data.height, -1))
    variables = initial_variables(method, num_ids)
    state = parallel.replicate(initial_state(method, variables, STEPS_PER_EPOCH))
    run_steps = make_train_steps(method, num_ids, STEPS_PER_EPOCH, parallel, compiler_options)
    batches = _random_batches(steps_per_call, num_ids, num_ids_per_batch, images_per_id, len(images))

    def call() -> Any:
        nonlocal state
        state, metrics = run_steps(state, batches, on_device)
        return metrics

    from_cache, started = compiled.from_cache, time.perf_counter()
    losses = jax.block_until_ready(call())["loss"]
    return _Program(
        call=call,
        steps_per_call=steps_per_call,
        batch_size=num_ids_per_batch * images_per_id,
        num_devices=parallel.num_devices,
        first_call_seconds=time.perf_counter() - started,
        from_cache=compiled.from_cache - from_cache,
        first_loss=float(losses[0]),
    )


def benchmark_step(
    settings: Settings,
    *,
    num_steps: int = 240,
    num_images: int = 2048,
    num_ids: int = NUM_IDS,
    num_devices: int | None = None,
    compiler_options: dict[str, str | bool] | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """Measure the training step in steady state, as `train` runs it, on random images in device memory.

    On accelerators train.steps_per_call steps are one program, so a call of it is the smallest thing that can be timed;
    its time is divided evenly among its steps. The network is random (init_from is not read), and nothing is logged or
    saved.

    Args:
      settings: the run whose step is measured.
      num_steps: timed steps, after two calls of warm-up; rounded up to a whole number of calls, at least five.
      num_images: images in device memory.
      num_ids: training identities.
      num_devices: how many devices are used; None: all.
      compiler_options: of XLA, for the step's program alone.
      profile: a folder for a `jax.profiler` trace of three further calls; None: no trace.

    Returns:
      images_per_second, median_ms, p10_ms, p90_ms: of a step; tenths_ms: the medians of ten parts, in their order.
      host_cpu_ms: this process's CPU time per step; on CPU that is the step itself.
      compile_seconds: the time to trace, lower and compile the program (see programs_from_cache).
      programs_from_cache: how many compiled programs came from a compilation cache; 0: all were compiled.
      peak_gib, image_set_gib: peak memory of the device (on CPU: of the process), and the image set's share of it.
      step_tflop: the work of a step's convolutions and matrix products, 3 × that of the forward pass, in TFLOP.
      tflops: the same per second.
      copy_ceiling_gb_per_second, matmul_ceiling_tflops: what all devices together reach, by `measure.ceilings`.
      arithmetic_floor_ms, memory_floor_ms: how long the step's work takes at the ceilings; its memory traffic is every
        convolution's output moved eight times, the least for separate layers.
      share_of_arithmetic, share_of_memory: floor / median.
    """
    images = random_images(settings, num_images)
    program = _compile(settings, images, num_ids, num_devices, compiler_options)
    steps_per_call = program.steps_per_call
    num_calls = max(-(-num_steps // steps_per_call), 5)
    cpu, warm_up = measure.cpu_seconds(), 2
    seconds = measure.seconds_per_call(program.call, num_calls, warm_up=warm_up) / steps_per_call
    cpu = (measure.cpu_seconds() - cpu) / ((1 + warm_up + num_calls) * steps_per_call)
    if profile:
        with jax.profiler.trace(profile):
            measure.seconds_per_call(program.call, 1, warm_up=1)
    results = {
        **measure.rates(seconds, program.batch_size),
        "tenths_ms": measure.tenths_ms(seconds),
        "host_cpu_ms": cpu * 1e3,
        "timed_steps": len(seconds) * steps_per_call,
        "steps_per_call": steps_per_call,
        "batch_size": program.batch_size,
        "dtype": compute_dtype(settings.dtype).name,
        "compile_seconds": float(program.first_call_seconds - np.median(seconds) * steps_per_call),
        "programs_from_cache": program.from_cache,
        "peak_gib": measure.peak_device_memory_gib(),
        "image_set_gib": images.nbytes / 2**30,
        "first_loss": program.first_loss,
        **({"compiler_options": [f"{k}={v}" for k, v in compiler_options.items()]} if compiler_options else {}),
    }
    return results | _shares(settings, num_ids, program.batch_size, program.num_devices, results["median_ms"])


def benchmark_tries(
    settings: Settings,
    tries: Mapping[str, dict[str, str | bool]],
    *,
    num_steps: int = 240,
    num_images: int = 2048,
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure the step as it is and with the options of each try, in turns, on one card.

    The programs are compiled one after the other in this process, so XLA times the kernels that they share only once
    and chooses the same for all. Then each is timed in every round.

    Args:
      settings: the run whose step is measured.
      tries: {name: options of XLA for the step's program alone}.
      num_steps: timed steps of a program in a round; rounded up to a whole number of calls, at least five.
      num_images: images in device memory.
      rounds: how often each program has its turn.

    Returns:
      rows: of the step as it is ('none') and of each try its `measure.rates` over all rounds, rounds_ms (the medians of
      the rounds), compile_seconds (with its first call), first_loss, and error: '' or why it could not be run, with its
      figures None.
    """
    images, programs = random_images(settings, num_images), {}
    errors = {"none": "", **dict.fromkeys(tries, "")}
    for name in errors:
        try:
            programs[name] = _compile(settings, images, NUM_IDS, None, tries.get(name))
        except jax.errors.JaxRuntimeError as error:
            errors[name] = first_line(error)
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            num_calls = max(-(-num_steps // program.steps_per_call), 5)
            seconds[name].append(measure.seconds_per_call(program.call, num_calls) / program.steps_per_call)
    figures: dict[str, dict[str, Any]] = {
        name: {
            **measure.rates(np.concatenate(seconds[name]), program.batch_size),
            "rounds_ms": [1e3 * float(np.median(times)) for times in seconds[name]],
            "compile_seconds": program.first_call_seconds,
            "first_loss": program.first_loss,
        }
        for name, program in programs.items()
    }
    missing = dict.fromkeys(next(iter(figures.values()), {}))
    return {"rows": [{"try": name, **figures.get(name, missing), "error": error} for name, error in errors.items()]}


def _first_devices(settings: Settings, number: int | None) -> Parallel:
    parallel = all_devices(settings.parallel)
    if number is None:
        return parallel
    if number > parallel.num_devices:
        raise UserError(f"{number} devices: JAX finds {parallel.num_devices}")
    return Parallel(parallel.devices[:number], parallel.mapping)


def _random_batches(
    steps: int, num_ids: int, num_ids_per_batch: int, images_per_id: int, num_images: int
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    labels = np.stack([generator.permutation(num_ids)[:num_ids_per_batch] for _ in range(steps)]).astype(np.int32)
    modality = np.arange(num_ids_per_batch * images_per_id, dtype=np.int32) % images_per_id >= images_per_id // 2
    return {
        "labels": labels.repeat(images_per_id, axis=1),
        "modality": np.tile(modality.astype(np.int32), (steps, 1)),
        "index": generator.integers(0, num_images, (steps, num_ids_per_batch * images_per_id), np.int32),
    }


def _shares(settings: Settings, num_ids: int, batch_size: int, num_devices: int, median_ms: float) -> dict[str, float]:
    dtype = compute_dtype(settings.dtype)
    forward, outputs = forward_work(settings, num_ids)
    ceilings = {name: value * num_devices for name, value in measure.ceilings(dtype).items()}
    step_tflop = 3 * forward * batch_size / 1e12
    moved_gb = measure.ACTIVATION_MOVES * outputs * batch_size * dtype.itemsize / 1e9
    arithmetic_ms = step_tflop / ceilings["matmul_ceiling_tflops"] * 1e3
    memory_ms = moved_gb / ceilings["copy_ceiling_gb_per_second"] * 1e3
    return {
        "step_tflop": step_tflop,
        "tflops": step_tflop / median_ms * 1e3,
        **ceilings,
        "arithmetic_floor_ms": arithmetic_ms,
        "memory_floor_ms": memory_ms,
        "share_of_arithmetic": arithmetic_ms / median_ms,
        "share_of_memory": memory_ms / median_ms,
    }


def forward_work(settings: Settings, num_ids: int = NUM_IDS) -> tuple[float, float]:
    """(floating-point operations, output values) per image of the forward pass's convolutions and matrix products.

    The operations are those actually computed: the stem's convolution over blocks includes the zeros that pad its
    kernel, 1.4 % of the whole.
    """
    network, data = make_method(settings).build(num_ids), settings.data
    variables = jax.eval_shape(lambda key: init_variables(network, key, data.height, data.width), jax.random.key(0))
    image = jax.ShapeDtypeStruct((2, data.height, data.width, 3), jnp.float32)
    # With running statistics, so that computing the batch's statistics does not count.
    work = measure.convolution_work(lambda v, x: network.apply(v, x, jnp.arange(2), train=False), variables, image)
    return work[0] / 2, work[1] / 2
