"""Where tfds is kept from what it does by itself: looking online, printing, and parsing whole records in Python."""

import contextlib
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.proto import tf_example_pb2


class LocalInfo(tfds.core.DatasetInfo):
    """A data set's info of which there is no copy online: licensed data are never in tfds's bucket.

    tfds asks its bucket before every build, and has no switch for that:
    https://github.com/tensorflow/datasets/issues/5719.
    """

    def initialize_from_bucket(self) -> None:
        """Looks for nothing."""


class SilentDownloads:
    """A mix-in for builders that download nothing: tfds prints all the same that it downloads and prepares."""

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded."""

    def _log_download_done(self) -> None:
        """See `_log_download_bytes`."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep tfds's own messages and progress bars off the terminal; it knows no switch for one call."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class EncodedImages(Sequence):
    """`encoded[i]`: image i's file as bytes. Safe to use from many threads, picklable for worker processes.

    Takes the one field out of the serialised record itself: tfds's parser of whole records works in Python, under its
    lock, and takes four times as long as the read.
    """

    def __init__(self, records: Sequence[bytes]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        record = self._records[range(len(self._records))[index]]  # IndexError ends iteration; the source's own is not
        # protobuf makes the module's classes when it is imported.
        return tf_example_pb2.Example.FromString(record).features.feature["image"].bytes_list.value[0]  # pyright: ignore[reportAttributeAccessIssue]
