"""Workarounds for tfds: it would look online, print, and parse whole records in Python."""

import contextlib
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.proto import tf_example_pb2


class LocalInfo(tfds.core.DatasetInfo):
    """The info of a data set that is not in tfds's bucket; licensed data never are.

    tfds asks its bucket before every build, and no option prevents that:
    https://github.com/tensorflow/datasets/issues/5719.
    """

    def initialize_from_bucket(self) -> None:
        """Does nothing."""


class SilentDownloads:
    """A mix-in for builders that download nothing; tfds would print that they download."""

    def _log_download_bytes(self) -> None:
        """Prints nothing."""

    def _log_download_done(self) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps tfds's messages and progress bars off the terminal."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class EncodedImages(Sequence):
    """A sequence of the image files in tfds records, as bytes; many threads may use it, and it can be pickled.

    It takes the field `image` out of the serialised record itself. tfds's parser of whole records runs in Python, under
    its lock, and takes four times as long as the read.
    """

    def __init__(self, records: Sequence[bytes]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        # `range` raises the IndexError that ends an iteration; the records raise another error.
        record = self._records[range(len(self._records))[index]]
        # pyright does not see the module's classes, which protobuf makes at import.
        return tf_example_pb2.Example.FromString(record).features.feature["image"].bytes_list.value[0]  # pyright: ignore[reportAttributeAccessIssue]
