"""Checkpoints: what saving them costs and leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_saves_leave_no_descriptors_threads_or_memory_behind(tmp_path):
    saves = 50
    command = [sys.executable, "-m", "tests.saves_process", str(tmp_path), "30", str(saves)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    growth = json.loads(result.stdout)
    assert (growth["descriptors"], growth["threads"]) == (0, 0)
    assert growth["bytes"] < 0.05 * 2**20 * saves
