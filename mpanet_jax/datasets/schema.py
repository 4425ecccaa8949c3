"""What data sets consist of: the record of one image, and a split, which is many of them.

Two splits of a data set are built, `train` and `test`. They may have parts: SYSU-MM01 trains on its lists `train` and
`val`, and a CSV data set tests on `test`, or on `query` and `gallery`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpanet_jax.modality import INFRARED, MODALITY_NAMES, UNKNOWN, VISIBLE

__all__ = ["INFRARED", "MODALITY_NAMES", "UNKNOWN", "VISIBLE", "ImageRecord", "Split"]


@dataclass(frozen=True)
class ImageRecord:
    """One image file of a raw data set.

    Attributes:
      path: below the raw folder, with '/' between parts: 'cam1/0007/0003.jpg'.
      pid: the identity, as the data set numbers it.
      camid: the camera, as the data set numbers it, or UNKNOWN.
      modality: VISIBLE or INFRARED.
      part: the part of the split that it is in, if there are parts.
      pid_name: the identity's name, if the data set has names and no numbers.
      line: the image's line in images.csv, if there is one.
    """

    path: str
    pid: int
    camid: int
    modality: int
    part: str = ""
    pid_name: str = ""
    line: int = 0


@dataclass(frozen=True)
class Split:
    """A prepared split: the metadata of N images in memory, and their files on demand.

    Attributes:
      name: for messages and file names, such as 'sysu_mm01/train'.
      pids, camids, modality: int32[N]; identities and cameras as the data set numbers them.
      paths: str[N], below the raw folder.
      encoded: a random-access sequence; `encoded[i]` is the JPEG or PNG file of image i as bytes. It can be pickled.
      fingerprint: changes whenever the prepared data change; caches have it in their names.
      parts: str[N], the part that each image is in; '' if the split has no parts.
      pid_names: str[N], the names of the identities; None if the data set has numbers.
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
        """The images of one part, as a split."""
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
