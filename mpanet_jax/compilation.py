"""The cache of compiled programs."""

from pathlib import Path

import jax


def set_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, or none if it is None or ''; call this before anything is compiled."""
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()) if folder else None)
    # Small programs too: dozens of them are compiled before the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
