"""What every data set of this project looks like: one image's record, and a split of them.

All three data sets (SYSU-MM01, RegDB, LLCM) share one schema; the protocols in `evaluation/protocols.py` derive
query and gallery from `camids` and `modality`, so a data set has two splits only, `train` and `test`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VISIBLE = 0
INFRARED = 1


@dataclass(frozen=True)
class ImageRecord:
    """One image file of a raw data set, before it is built."""

    path: str  # below the raw root, with '/' between parts: 'cam1/0007/0003.jpg'
    pid: int  # the identity as the data set numbers it
    camid: int  # the camera, from 1
    modality: int  # VISIBLE or INFRARED


@dataclass(frozen=True)
class Split:
    """A prepared split: the metadata of N images in memory, their encoded bytes on demand.

    Attributes:
      name: for messages, 'sysu_mm01/train'.
      pids, camids, modality: int32[N]; identities as the data set numbers them.
      paths: str[N], relative to the raw root.
      encoded: a random-access sequence; `encoded[i]` is the JPEG or PNG file of image i as bytes. Picklable.
      fingerprint: changes whenever the prepared data change; caches are keyed by it.
    """

    name: str
    pids: np.ndarray
    camids: np.ndarray
    modality: np.ndarray
    paths: np.ndarray
    encoded: Sequence[bytes]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.pids)

    @property
    def labels(self) -> np.ndarray:
        """int32[N]: the identities renumbered to [0, num_ids), in ascending order of pid."""
        return np.unique(self.pids, return_inverse=True)[1].astype(np.int32)

    @property
    def num_ids(self) -> int:
        return len(np.unique(self.pids))
