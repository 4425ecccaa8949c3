"""What the log writes, and what it does not import."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mpanet_jax.metric_log import MetricLog

SCRIPT = """
import sys
from pathlib import Path
from mpanet_jax.metric_log import MetricLog

with MetricLog(Path(sys.argv[1]), total_steps=10, first_step=0) as log:
    log.scalars(5, {"train/loss": 1.5})
    log.status("loss 1.5")
assert "torch" not in sys.modules
import torch
assert torch.ones(2).sum() == 2
"""


def read_events(path):
    """Records: length uint64, its checksum uint32, the data, their checksum uint32."""
    data, start = path.read_bytes(), 0
    while start < len(data):
        length = int.from_bytes(data[start : start + 8], "little")
        yield Event.FromString(data[start + 12 : start + 12 + length])
        start += 16 + length


def test_scalars_are_written_without_importing_pytorch(tmp_path):
    root = Path(__file__).parent.parent
    process = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert not process.stderr  # a bar's line comes after a minute
    (path,) = (tmp_path / "logs").iterdir()
    scalars = [
        (event.step, value.tag, value.simple_value) for event in read_events(path) for value in event.summary.value
    ]
    assert scalars == [(5, "train/loss", 1.5)]


@pytest.mark.parametrize("first_step", [0, 3])
def test_a_resumed_run_hides_what_lies_behind_its_checkpoint_and_no_more(tmp_path, first_step):
    with MetricLog(tmp_path, total_steps=10, first_step=first_step):
        pass
    (path,) = (tmp_path / "logs").iterdir()
    # TensorBoard drops what was written before from this step on.
    hidden_from = [event.step for event in read_events(path) if event.session_log.status == SessionLog.START]
    assert hidden_from == [first_step + 1]


def full_disk(event):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("queue_is_full", [False, True])
def test_a_full_disk_is_said_and_nothing_waits_for_the_dead_writer(tmp_path, monkeypatch, queue_is_full):
    with MetricLog(tmp_path, total_steps=10, first_step=0) as log:
        writer = log._events
        monkeypatch.setattr(writer._ev_writer, "write_event", full_disk)
        writer._event_queue.put("event")
        writer._worker.join()
        while queue_is_full and not writer._event_queue.full():
            writer._event_queue.put("unread")
        for add in (
            lambda: log.scalars(2, {"train/loss": 1.5}),
            lambda: log.picture("batch", np.zeros((4, 4, 3), np.uint8), 2),
            lambda: log.histogram("distance", np.arange(3.0), 2),
        ):
            with pytest.raises(OSError) as raised:
                add()
            assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "logs")
    assert writer._closed  # at exit tensorboardX closes every writer that is not


def test_histogram_leaves_out_what_is_no_number(tmp_path):
    with MetricLog(tmp_path, total_steps=10, first_step=0) as log:
        log.histogram("distance", np.array([1.0, np.nan, 2.0, np.inf]), 1)
        log.histogram("distance", np.array([np.nan]), 2)
    (path,) = (tmp_path / "logs").iterdir()
    found = [(event.step, value.histo.num) for event in read_events(path) for value in event.summary.value]
    assert found == [(1, 2.0)]
