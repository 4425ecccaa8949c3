"""What the measurements have in common: timing, the machine's ceilings, the work of a network, and reports."""

import datetime
import json
import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evaluation import anonymous_memory_gib, peak_memory_gib
from benchmarks.provenance import commit, processor
from mpanet_jax.files import write_whole
from mpanet_jax.metric_log import wait_until_ready

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
# How often a training step reads or writes every convolution's output, at least, if convolution, batch norm and ReLU
# are separate layers. A program that fuses them can need less.
ACTIVATION_MOVES = 8


class CompileLog:
    """Records what JAX has compiled since this object was made.

    Attributes:
      times: when each compilation ended, as `time.perf_counter` gives it.
      from_cache: how many programs came from the compilation cache instead.
    """

    def __init__(self):
        self.times: list[float] = []
        self.from_cache = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.times.append(time.perf_counter())

    def _on_event(self, event: str, **_: Any) -> None:
        self.from_cache += event == "/jax/compilation_cache/cache_hits"


def seconds_per_call(call: Callable[[], Any], num_calls: int, *, warm_up: int = 2) -> np.ndarray:
    """Seconds between the results of consecutive calls, in a loop that never lets the device wait.

    Call n+1 is dispatched before the loop waits for the result of call n.

    Args:
      call: dispatches work and returns JAX arrays.
      num_calls: how many intervals to measure.
      warm_up: how many intervals before them to leave out.

    Returns:
      float[num_calls].
    """
    finished: list[Future[float]] = []
    # The clock has a thread of its own, since dispatching a call may take longer than the call before it.
    with ThreadPoolExecutor(1) as clock:
        for _ in range(1 + warm_up + num_calls):
            finished.append(clock.submit(wait_until_ready, call()))
            if len(finished) > 1:
                finished[-2].result()
    return np.diff([moment.result() for moment in finished])[warm_up:]


def rates(seconds: np.ndarray, images: int) -> dict[str, float]:
    """Median, p10 and p90 of `seconds` in milliseconds, and images/s at the median.

    Args:
      seconds: the times of several calls.
      images: how many images a call handles.
    """
    p10, median, p90 = np.percentile(seconds, (10, 50, 90))
    return {
        "images_per_second": float(images / median),
        "median_ms": float(median * 1e3),
        "p10_ms": float(p10 * 1e3),
        "p90_ms": float(p90 * 1e3),
    }


def tenths_ms(seconds: np.ndarray) -> list[float]:
    """The medians of ten parts of `seconds`, one after the other, in milliseconds: whether a long run slows down."""
    return [float(np.median(part) * 1e3) for part in np.array_split(seconds, 10) if len(part)]


def peak_device_memory_gib() -> float:
    """Peak memory of the fullest accelerator so far, in GiB; on CPU this process's peak resident memory."""
    stats = [device.memory_stats() for device in jax.local_devices() if device.platform != "cpu"]
    if not stats or None in stats:
        return peak_memory_gib()
    return max(s["peak_bytes_in_use"] for s in stats) / 2**30


def ceilings(dtype: jnp.dtype) -> dict[str, float]:
    """Measure what one device reaches on random data: a large copy in GB/s, a large matmul of `dtype` in TFLOP/s.

    The copy counts bytes read and bytes written. Matmuls of float32 have JAX's default precision (TF32 on NVIDIA GPUs).
    Read the peak memory before calling this, as it takes memory itself.
    """
    on_cpu = jax.default_backend() == "cpu"
    num_bytes, size = (2**24, 512) if on_cpu else (2**30, 8192)
    generator = np.random.default_rng(0)
    data = jax.device_put(generator.integers(0, 2**32, num_bytes // 4, np.uint32))
    a, b = (jnp.asarray(generator.standard_normal((size, size), np.float32), dtype) for _ in range(2))
    copy, matmul = jax.jit(jnp.copy), jax.jit(jnp.matmul)
    copy_seconds = np.median(seconds_per_call(lambda: _repeat(lambda: copy(data), 10), 10)) / 10
    matmul_seconds = np.median(seconds_per_call(lambda: _repeat(lambda: matmul(a, b), 10), 10)) / 10
    return {
        "copy_ceiling_gb_per_second": float(2 * num_bytes / copy_seconds / 1e9),
        "matmul_ceiling_tflops": float(2 * size**3 / matmul_seconds / 1e12),
    }


def _repeat(call: Callable[[], jax.Array], times: int) -> jax.Array:
    """The last of `times` results; a single call would measure the time of its dispatch too."""
    for _ in range(times - 1):
        call()
    return call()


def cpu_seconds() -> float:
    """What the CPUs have worked for this process so far, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def peak_anonymous_memory_gib() -> Iterator[list[float]]:
    """A list whose one value is the peak of `anonymous_memory_gib`, every 20 ms, while the block runs."""
    peak, finished = [anonymous_memory_gib()], threading.Event()

    def watch() -> None:
        while not finished.wait(0.02):
            peak[0] = max(peak[0], anonymous_memory_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        finished.set()
        watcher.join()
        peak[0] = max(peak[0], anonymous_memory_gib())


def convolution_work(function: Callable, *arguments: Any) -> tuple[float, float]:
    """(floating-point operations, output values) of all convolutions and matrix products in `function`.

    It is traced on `arguments`, arrays or `jax.ShapeDtypeStruct`s, and not run.
    """
    operations = outputs = 0.0
    for equation in _equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name not in ("conv_general_dilated", "dot_general"):
            continue
        left, right = (variable.aval for variable in equation.invars[:2])
        size = equation.outvars[0].aval.size
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = np.prod([left.shape[axis] for axis in contracted])
        else:
            terms = right.size / right.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        operations += 2 * size * terms
        outputs += size
    return float(operations), float(outputs)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        # Only one branch runs; where the platform decides which, all branches do the same work.
        parameters = {**equation.params, "branches": equation.params.get("branches", ())[:1]}
        for value in parameters.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)  # of a ClosedJaxpr
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def has_accelerator() -> bool:
    """Whether JAX computes on something other than the CPU."""
    return jax.default_backend() != "cpu"


def environment() -> dict[str, Any]:
    """The date, commit, device and versions that a figure was measured with."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "commit": commit("mpanet_jax", "benchmarks"),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "runtime": " ".join(device.client.platform_version.split()),
            "cpus": os.cpu_count(),
            "processor": processor(),
        },
        "versions": versions,
        "compilation_cache": jax.config.jax_compilation_cache_dir,
    }


def seconds_since_process_start() -> float | None:
    """Seconds since this process was started; None on systems other than Linux, which do not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except OSError:
        return None


def format_report(report: dict[str, Any]) -> str:
    """A line with the device, and below it a table of the results, for the terminal."""
    name, device, results = report["name"], report["device"], report["results"]
    head = f"{name} on {device['count']} x {device['kind']}, jax {report['versions']['jax']}"
    if "rows" in results:
        return "\n".join([head, "", *rows_table(results)])
    width = max(map(len, results))
    return "\n".join([head, *(f"  {key:{width}}  {format_value(value)}" for key, value in results.items())])


def rows_table(results: dict[str, Any], titles: dict[str, str] | None = None) -> list[str]:
    """The lines of a Markdown table of results that are `rows`, with the exponents that fit its columns below.

    Args:
      results: what `benchmark_growth` returns.
      titles: {key: title} of the columns that the table has, all under their keys by default.
    """
    rows = results["rows"]
    titles = titles or dict(zip(rows[0], rows[0], strict=True))
    size = next(iter(rows[0]))
    lines = [f"| {' | '.join(titles.values())} |", f"|{'---|' * len(titles)}"]
    lines += [f"| {' | '.join(format_value(row[key]) for key in titles)} |" for row in rows]
    for key, title in (("exponents", "exponent"), ("last_exponents", "of the last two")):
        if fitted := results.get(key):
            cells = [title if name == size else f"{fitted[name]:.2f}" if name in fitted else "" for name in titles]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_value(value: Any) -> str:
    """Format a result for a table; None is an empty cell."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(format_value, value)) if isinstance(value, list | tuple) else str(value)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON; the file appears whole or not at all."""
    with write_whole(path) as file:
        file.write(json.dumps(report, indent=2) + "\n")
