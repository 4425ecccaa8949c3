"""Steps whose loss is no number: what ends the run, and what it leaves as a report."""

import json

import numpy as np
import pytest

from mpanet_jax.errors import UserError
from mpanet_jax.nonfinite import REPORT_FILE, FiniteCheck

PATHS = np.array([f"cam1/0001/{number:04d}.jpg" for number in range(100)])


def check_of(mode, workdir, **options):
    return FiniteCheck(mode, workdir, lambda step: PATHS[step : step + 4], **options)


@pytest.mark.parametrize("bad, shown", [(np.nan, "nan"), (np.inf, "inf")])
def test_stop_reports_step_terms_and_images(tmp_path, bad, shown):
    check = check_of("stop", tmp_path / "run")
    check.check(30, {"loss": np.ones(3), "identity": np.ones(3)})
    with pytest.raises(UserError, match=rf"^step 35: the loss is {shown}; .*{tmp_path}/run/{REPORT_FILE}"):
        check.check(33, {"loss": np.array([1, bad, bad]), "identity": np.array([0.5, 0.25, bad])})
    report = json.loads((tmp_path / "run" / REPORT_FILE).read_text())
    assert report["terms"] == {"loss": shown, "identity": 0.25}
    assert (report["step"], report["images"]) == (35, PATHS[35:39].tolist())


def test_ten_skipped_steps_in_a_row_end_the_run(tmp_path):
    check = check_of("skip", tmp_path)
    for before in range(0, 30, 10):  # nine in a row, over the bounds of calls
        skipped = np.ones(10) if before % 20 else np.array([0] + [1] * 4 + [0] * 5)
        if before == 10:
            skipped[9] = 0
        check.check(before, {"loss": np.full(10, np.nan), "skipped": skipped})
    assert check.skipped == 4 + 9 + 4 and not list(tmp_path.iterdir())
    check.check(30, {"loss": np.full(9, np.nan), "skipped": np.ones(9)})
    with pytest.raises(UserError, match=r"^step 40: the 10th step in a row was skipped"):
        check.check(39, {"loss": np.full(3, np.nan), "skipped": np.ones(3)})
    assert json.loads((tmp_path / REPORT_FILE).read_text())["images"] == PATHS[40:44].tolist()


def test_one_process_writes_the_report(tmp_path):
    with pytest.raises(UserError, match=r"^step 1: the loss is nan"):
        check_of("stop", tmp_path, writes=False).check(0, {"loss": np.array([np.nan])})
    assert not list(tmp_path.iterdir())
