"""A check that the prepared test images can be read, made while training runs and not after it."""

from mpanet_jax.background import InBackground
from mpanet_jax.data.decode import encoded_image
from mpanet_jax.datasets.schema import Split


class RecordCheck:
    """Reads every record of some splits in the background; array_record checks its blocks as it reads them."""

    def __init__(self, *splits: Split):
        self._splits = splits
        self._check = InBackground(self._read_all)

    def start(self) -> None:
        """Starts the check, unless it has been started."""
        self._check.start()

    def _read_all(self) -> None:
        for split in self._splits:
            for i in range(len(split)):
                encoded_image(split, i)

    def require(self) -> None:
        """Waits until all records have been read.

        Raises:
          UserError: a record is damaged; the message names its image.
        """
        self._check.result()
