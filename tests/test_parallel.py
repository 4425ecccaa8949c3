"""Several devices compute what one device computes; several steps in one call what they compute one by one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpanet_jax.call_plan import cut_into_calls
from mpanet_jax.errors import UserError
from mpanet_jax.parallel import global_num_ids
from tests.limits import HANGS_AFTER
from tests.parallel_process import CASES, case_name

ROOT = Path(__file__).parent.parent
# All in one worker: they share one process, which takes minutes.
pytestmark = pytest.mark.xdist_group("parallel")


@pytest.fixture(scope="module")
def deviations(tmp_path_factory):
    result = tmp_path_factory.mktemp("parallel") / "result.json"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_X64": "1",
        # Without the last flag, XLA aborts where a busy machine has some devices wait a minute for others.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8 "
        f"--xla_cpu_collective_call_terminate_timeout_seconds={HANGS_AFTER}",
    }
    command = [sys.executable, "-m", "tests.parallel_process", str(result)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return json.loads(result.read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case_name(*case))
def test_many_devices_give_the_result_of_one(deviations, case):
    found = deviations[case_name(*case)]
    # opt_state holds the sums of the gradients and of their squares.
    assert set(found) == {"params", "batch_stats", "opt_state", "averages", "metrics"}
    assert max(found.values()) < 1e-9, found
    assert deviations["paper against official"]["params"] > 1e-4


def test_plain_and_fused_networks_train_alike(deviations):
    found = deviations["plain against fused"]
    assert set(found) == {"params", "batch_stats", "opt_state", "averages", "metrics"}
    assert max(found.values()) < 1e-8, found


def test_embeddings_of_many_devices_are_those_of_one(deviations):
    assert deviations["embeddings"]["embeddings"] < 1e-9


def test_images_are_resized_where_their_rows_are_used(deviations):
    assert deviations["resized images"] == {"pmap": 0, "shard_map": 0}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("way", ["summed", "product of all"])
def test_classifiers_gradients_are_global(deviations, way, dtype):
    found = deviations[f"classifier, {way}, {dtype}"]
    assert set(found) == {"logits", "d_embedding", "d_kernel"}
    if way == "summed" and dtype == "bfloat16":
        assert 0 < found.pop("d_kernel") < 0.02  # of values about 1, each device's part is rounded
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize(
    ("p", "devices", "nearest"), [(16, 3, "15 or 18"), (6, 4, "4 or 8"), (3, 4, "use 4,"), (10, 8, "8 or 16")]
)
def test_identities_that_do_not_divide_are_named_with_the_nearest_that_do(p, devices, nearest):
    with pytest.raises(UserError, match=f"data.num_ids_per_batch = {p} .* {devices} devices.*{nearest}"):
        global_num_ids(p, devices, "global")
    assert global_num_ids(p, devices, "per_device") == p * devices


def test_identities_that_divide_are_kept():
    assert global_num_ids(16, 4, "global") == global_num_ids(16, 1, "global") == 16


def _assert_whole(cut, first, stops):
    """The calls follow one another, and one ends at every stop."""
    assert [before for before, _ in cut] == [first, *[after for _, after in cut[:-1]]]
    assert {stop for stop in stops if stop > first} <= {after for _, after in cut}


@pytest.mark.parametrize("first", [0, 15, 30])
def test_calls_end_at_every_stop_and_have_two_lengths(first):
    cut = list(cut_into_calls(first, 47, 4, (15, 0)))
    _assert_whole(cut, first, (15, 30, 45, 47))
    assert {after - before for before, after in cut} == {1, 4}
    # 15 = 3·4 + 3, and so after a resumed stop too.
    if first == 15:
        assert cut[:6] == [(15, 19), (19, 23), (23, 27), (27, 28), (28, 29), (29, 30)]


@pytest.mark.parametrize(
    ("total", "at_most", "stops", "length"),
    [
        (140 * 183, 15, (5 * 183, 20 * 183), 15),  # SYSU-MM01
        (140 * 183, 8, (5 * 183, 0), 5),
        (60, 16, (15, 20), 5),
        (94, 15, (47,), 15),  # nothing in common: two lengths
        (188, 16, (94,), 16),  # 2 is less than a third of 16
    ],
)
def test_calls_have_one_length_where_that_is_not_too_short(total, at_most, stops, length):
    cut = list(cut_into_calls(0, total, at_most, stops))
    _assert_whole(cut, 0, [total, *(stop for every in stops if every for stop in range(every, total, every))])
    lengths = {after - before for before, after in cut}
    assert lengths <= {length, 1}
    assert (lengths == {length}) == (math.gcd(total, *stops) % length == 0)


def test_calls_resumed_between_two_calls_get_back_in_step():
    assert list(cut_into_calls(7, 20, 5, (10,))) == [(7, 8), (8, 9), (9, 10), (10, 15), (15, 20)]


def test_one_step_a_call_is_one_step_a_call():
    assert list(cut_into_calls(2, 5, 1, (3, 2))) == [(2, 3), (3, 4), (4, 5)]
