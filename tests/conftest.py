"""Settings that must stand before jax starts."""

import gc
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

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


# The files and groups that take longest. They are begun first: begun last, one of them would leave the other workers
# without work in the end.
LONGEST = (
    *("test_distributed.py", "test_train.py", "test_parallel.py", "test_golden.py", "test_benchmark_script.py"),
    *("test_parity.py", "test_resume.py", "test_fine_tuning.py", "test_fused.py", "test_extract.py", "test_agw.py"),
    *("test_reading.py", "test_docs.py", "test_kill.py", "test_step.py", "test_device_resize.py", "test_pipeline.py"),
    *("test_checkpoint.py", "test_augment.py", "test_synthetic.py", "test_weights.py", "test_prepare.py"),
    *("test_architecture_page.py", "test_figures.py", "test_own_data.py", "test_quickstart.py"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup`, a file's tests go to one worker too: what they share is made once."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class ByGroupOrFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            group = super()._split_scope(nodeid)
            return nodeid.split("::")[0] if group == nodeid else group

    config.option.loadscopereorder = False  # which would begin with those of the most tests
    return ByGroupOrFile(config, log)
