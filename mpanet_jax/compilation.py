"""A script's start: devices that start while it imports, faster compilation, and the cache of compiled programs."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import threading
from pathlib import Path

# Scripts read it before JAX is imported.
DEFAULT_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/mpanet_jax/xla"
# How many objects are made between two searches for garbage, while a script starts and after that.
_AT_START, _LATER = 1_000_000, 10_000
_TILINGS = "--xla_gpu_experimental_cost_model_gemm_tiling_options"
# The releases of jaxlib that were seen to have it. XLA ends a process with a flag that it does not know.
_HAVE_TILINGS = ("0.10.1", "0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1")


def start_fast(*, devices: bool) -> None:
    """Shortens the start of a script that traces large programs; call this before other modules are imported.

    Until `end_start` is called, Python hardly looks for garbage. XLA compiles faster for NVIDIA GPUs
    (`autotune_fewer_tilings`).

    Args:
      devices: whether to start the accelerators at once, in a thread: their driver takes seconds, in which the script
        can import its modules. Not in a process that will join others. A process that ends sooner waits for them, and
        what would choose among devices has to be set before, such as CUDA_VISIBLE_DEVICES.
    """
    # Imports and tracing make objects by the million, and few of them are garbage: by Python's own threshold, looking
    # for it takes a seventh of the time.
    gc.set_threshold(_AT_START)
    autotune_fewer_tilings()
    if devices:
        import jax

        def start() -> None:
            with contextlib.suppress(Exception):  # whoever uses JAX next gets the error again
                jax.devices()

        threading.Thread(target=start).start()


def end_start() -> None:
    """Has Python look for garbage more often, if `start_fast` was called; garbage may hold large arrays."""
    if gc.get_threshold()[0] == _AT_START:
        gc.set_threshold(_LATER)


def autotune_fewer_tilings() -> None:
    """Has XLA compile programs for NVIDIA GPUs faster, in this process and those that it starts.

    For a matrix product XLA compiles and times about fourteen tilings of a Triton kernel, beside cuBLAS's kernels. This
    leaves it the four of them that its cost model takes for the fastest. Call it before anything asks for a device.
    The option is added to XLA_FLAGS in the environment, unless it is there or XLA_FLAGS names a file of flags. Without
    JAX's plugin for NVIDIA GPUs, or with a jaxlib that is not known to have the option, nothing is done.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    plugin = any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13))
    of_ones_own = _TILINGS in flags or (flags and not flags.startswith("-"))
    if plugin and not of_ones_own and importlib.metadata.version("jaxlib") in _HAVE_TILINGS:
        os.environ["XLA_FLAGS"] = f"{flags} {_TILINGS}=top=4,top_from_default=1".strip()


def set_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, or none if it is None or ''; call this before anything is compiled."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()) if folder else None)
    # Small programs too: dozens of them are compiled before the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
