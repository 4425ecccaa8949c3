"""What `scripts/benchmark.py step --try=NAME` measures computes the same step as the package does."""

from functools import partial

import jax
import numpy as np
import pytest

from benchmarks.tries import TRIES, applied
from mpanet_jax.errors import UserError
from mpanet_jax.step import train_steps
from tests.methods_in_tests import MPANetOfTwoBlocks, small_mpanet, start

P, K, HEIGHT, WIDTH, STEPS = 3, 4, 32, 16, 2
OF_A_GPU = "exact_by_bfloat16"


def batches():
    rng = np.random.default_rng(0)
    return {
        "labels": np.tile(np.repeat(np.arange(P, dtype=np.int32), K), (STEPS, 1)),
        "modality": np.tile(np.array([0, 0, 1, 1], np.int32), (STEPS, P)),
        "images": rng.integers(0, 256, (STEPS, P * K, HEIGHT, WIDTH, 3), np.uint8),
    }


def steps_of(dtype):
    """Two steps, which have not been traced, and the state before them."""
    # The losses that no try is about are left out, and compiled in no time.
    off = {f"loss__{name}": 0.0 for name in ("center_cluster", "modality_identity", "mutual_mean")}
    method = MPANetOfTwoBlocks(small_mpanet(data__images_per_id=K, dtype=dtype, model__fused="on", **off).settings)
    options = {"method": method, "network": method.build(P), "steps_per_epoch": 10}
    return jax.jit(partial(train_steps, **options)), partial(start, method, P, HEIGHT, WIDTH)


def trained(*names):
    with jax.enable_x64(True), applied(names):
        steps, make_state = steps_of("float64")
        state, metrics = steps(make_state(), batches())
        return jax.device_get((state.params, state.batch_stats, metrics))


@pytest.fixture(scope="module")
def base():
    return trained()


@pytest.mark.parametrize("name", sorted(set(TRIES) - {OF_A_GPU}))
def test_a_try_is_the_same_step(name, base):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-10), trained(name), base)


def program(monkeypatch, *names):
    """The StableHLO of the steps for a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with applied(names):
        steps, make_state = steps_of("bfloat16")
        return jax.export.export(steps, platforms=["cuda"])(jax.eval_shape(make_state), batches()).mlir_module()


def test_every_try_changes_the_program_of_a_gpu(monkeypatch):
    programs = {name: program(monkeypatch, name) for name in TRIES}
    assert len({program(monkeypatch), *programs.values()}) == 1 + len(TRIES)
    assert "num_primitive_operations = 6" in programs[OF_A_GPU]


def test_an_unknown_try_is_named():
    with pytest.raises(UserError, match="--try=faster: expected one of"), applied(["faster"]):
        pass
