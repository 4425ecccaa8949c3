"""A run that is killed five times ends as if it never was; make test-kill does fifty."""

from tests.kill_matrix import kill_matrix


def test_run_that_is_killed_five_times_loses_nothing(tmp_path):
    found = kill_matrix(tmp_path, 5, seed=1, two_processes=False)
    assert sum(found["kills"].values()) == 5 and found["kills"]["preparing data"] == 1
    assert found["losses"] == []
