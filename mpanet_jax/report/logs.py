"""Reads the scalars of a run's logs back from TensorBoard's event files."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpanet_jax.errors import UserError

Series = tuple[np.ndarray, np.ndarray]  # steps int[n], values float[n]


def read_events(path: Path) -> Iterator[Any]:
    """Read the events of a file; a last record that is cut off, as in a killed run, is ignored.

    A record is its length (uint64), the length's checksum (uint32), its bytes, and their checksum (uint32).
    """
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]: made by protobuf

    data, start = path.read_bytes(), 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        record = data[start + 12 : start + 12 + length]
        if len(record) < length:
            return
        yield Event.FromString(record)
        start += 16 + length


def read_scalars(workdir: str | Path) -> dict[str, Series]:
    """Read the scalars of a run.

    If the run was resumed from a checkpoint, the values that it had logged beyond that checkpoint are dropped, as in
    TensorBoard.

    Returns:
      {name: (steps int[n], values float[n])}, ascending by step.

    Raises:
      UserError: the run has no logs, or one is damaged.
    """
    files = sorted((Path(workdir) / "logs").glob("events.out.tfevents.*"))
    if not files:
        raise UserError(f"{Path(workdir) / 'logs'}: no logs; expected the folder of a run that has trained")
    points: dict[str, dict[int, float]] = {}
    for path in files:
        try:
            for event in read_events(path):
                if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                    for series in points.values():
                        for step in [step for step in series if step >= event.step]:
                            del series[step]
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        points.setdefault(value.tag, {})[event.step] = value.simple_value
        except Exception as error:  # protobuf raises exceptions of its own
            reason = type(error).__name__
            raise UserError(f"{path}: damaged ({reason}); move it away to draw what the others hold") from error
    return {
        name: (np.array(sorted(series)), np.array([series[step] for step in sorted(series)]))
        for name, series in points.items()
        if series
    }
