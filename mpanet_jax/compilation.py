"""A script's start: devices that start while it imports, and the cache of compiled programs."""

import contextlib
import gc
import os
import threading
from pathlib import Path

# Scripts read it before JAX is imported.
DEFAULT_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/mpanet_jax/xla"
# How many objects are made between two searches for garbage, while a script starts and after that.
_AT_START, _LATER = 1_000_000, 10_000


def start_fast(*, devices: bool) -> None:
    """Shortens the start of a script that traces large programs; call this before other modules are imported.

    Until `end_start` is called, Python hardly looks for garbage.

    Args:
      devices: whether to start the accelerators at once, in a thread: their driver takes seconds, in which the script
        can import its modules. Not in a process that will join others. A process that ends sooner waits for them, and
        what would choose among devices has to be set before, such as CUDA_VISIBLE_DEVICES.
    """
    # Imports and tracing make objects by the million, and few of them are garbage: by Python's own threshold, looking
    # for it takes a seventh of the time.
    gc.set_threshold(_AT_START)
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


def set_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, or none if it is None or ''; call this before anything is compiled."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()) if folder else None)
    # Small programs too: dozens of them are compiled before the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
