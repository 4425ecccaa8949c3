"""A check that the prepared test images can be read, made while training runs and not after it."""

import threading
from concurrent.futures import Future

from mpanet_jax.data.decode import encoded_image
from mpanet_jax.datasets.schema import Split


class RecordCheck:
    """Reads every record of some splits in the background; array_record checks its blocks as it reads them."""

    def __init__(self, *splits: Split):
        self._result: Future[None] = Future()
        self._splits = splits
        self._thread = threading.Thread(target=self._run, daemon=True)  # a daemon: the run may end before it

    def start(self) -> None:
        """Starts the check, unless it has been started."""
        if self._thread.ident is None:
            self._thread.start()

    def _run(self) -> None:
        try:
            for split in self._splits:
                for i in range(len(split)):
                    encoded_image(split, i)
            self._result.set_result(None)
        except BaseException as error:
            self._result.set_exception(error)

    def require(self) -> None:
        """Waits until all records have been read.

        Raises:
          UserError: a record is damaged; the message names its image.
        """
        self.start()
        self._result.result()
