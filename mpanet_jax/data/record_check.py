"""A check that the prepared test images can be read, made while training runs and not after it."""

import threading
from concurrent.futures import Future

from mpanet_jax.data.decode import encoded_image
from mpanet_jax.datasets.schema import Split


class RecordCheck:
    """Reads every record of some splits in the background; array_record checks its blocks as it reads them."""

    def __init__(self, *splits: Split):
        self._result: Future[None] = Future()
        threading.Thread(target=self._run, args=splits, daemon=True).start()  # a daemon: the run may end before it

    def _run(self, *splits: Split) -> None:
        try:
            for split in splits:
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
        self._result.result()
