"""What every data set of this project looks like: one image's record, and a split of them.

A data set has two splits that are built, `train` and `test`. Its own lists may cut these further, into parts: SYSU-MM01
trains on its lists `train` and `val`, a CSV data set tests on `test`, or on `query` and `gallery`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpanet_jax.modality import INFRARED, MODALITY_NAMES, UNKNOWN, VISIBLE

__all__ = ["INFRARED", "MODALITY_NAMES", "UNKNOWN", "VISIBLE", "ImageRecord", "Split"]


@dataclass(frozen=True)
class ImageRecord:
    """One image file of a raw data set, before it is built."""

    path: str  # below the raw root, with '/' between parts: 'cam1/0007/0003.jpg'
    pid: int  # the identity as the data set numbers it
    camid: int  # the camera as the data set numbers it, or UNKNOWN
    modality: int  # VISIBLE or INFRARED
    part: str = ""  # the list that it is in, where the split has several
    pid_name: str = ""  # what the data set calls the identity, where that is no number
    line: int = 0  # of the file that lists the images with all that is known of them, where there is one


@dataclass(frozen=True)
class Split:
    """A prepared split: the metadata of N images in memory, their encoded bytes on demand.

    Attributes:
      name: for messages and file names, 'sysu_mm01/train'.
      pids, camids, modality: int32[N]; identities as the data set numbers them.
      paths: str[N], relative to the raw root.
      encoded: a random-access sequence; `encoded[i]` is the JPEG or PNG file of image i as bytes. Picklable.
      fingerprint: changes whenever the prepared data change; caches are keyed by it.
      parts: str[N], which list an image is in; '' where the split has no parts.
      pid_names: str[N], what the data set calls the pids; None where they are its own numbers.
    """

    name: str
    pids: np.ndarray
    camids: np.ndarray
    modality: np.ndarray
    paths: np.ndarray
    encoded: Sequence[bytes]
    fingerprint: str
    parts: np.ndarray
    pid_names: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pids)

    @property
    def labels(self) -> np.ndarray:
        """int32[N]: the identities renumbered to [0, num_ids), in ascending order of pid."""
        return np.unique(self.pids, return_inverse=True)[1].astype(np.int32)

    @property
    def num_ids(self) -> int:
        return len(np.unique(self.pids))

    def only(self, part: str) -> "Split":
        """The images of one part, as a split of its own."""
        rows = np.flatnonzero(self.parts == part)
        columns = ("pids", "camids", "modality", "paths", "parts", "pid_names")
        return dataclasses.replace(
            self,
            name=f"{self.name}-{part}",
            encoded=_Rows(self.encoded, rows),
            fingerprint=f"{self.fingerprint}-{part}",
            **{name: None if (column := getattr(self, name)) is None else column[rows] for name in columns},
        )


@dataclass(frozen=True)
class _Rows(Sequence):
    """Some items of a sequence."""

    items: Sequence[bytes]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.items[int(self.rows[index])]
