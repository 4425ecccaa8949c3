"""The cache of compiled programs."""

import os
from pathlib import Path

# Scripts read it before JAX is imported.
DEFAULT_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/mpanet_jax/xla"


def set_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, or none if it is None or ''; call this before anything is compiled."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()) if folder else None)
    # Small programs too: dozens of them are compiled before the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
