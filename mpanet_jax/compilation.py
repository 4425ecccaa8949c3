"""Where compiled programs are kept."""

from pathlib import Path

import jax


def set_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`; None or '' compiles everything anew. To be called before the first one."""
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()) if folder else None)
    # The small ones too: dozens of them are compiled before the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
