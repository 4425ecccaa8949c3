"""Settings that must stand before jax starts."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the suite's time would go into optimising programs that run for a second: XLA takes a fifth of it so.
# XLA_FLAGS in the environment takes precedence: XLA_FLAGS=' ' tests the programs as users run them.
# One thread for a program, and so no pieces of it: the workers keep the processors busy, and cutting costs a tenth.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know it
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
# Threads of PyTorch and of BLAS wait for each other busily, on processors that the other workers need.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Many tests compile the same small programs; compile each of them once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Tracing makes objects by the million, and few of them are garbage: by Python's own thresholds, looking for it takes a
# tenth of the time of a test that trains.
gc.set_threshold(100_000, 20, 100)


def pytest_collection_finish() -> None:
    """Takes what the imports have made out of the collector's sight."""
    gc.freeze()
