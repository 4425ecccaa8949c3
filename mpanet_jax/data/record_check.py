"""Whether the prepared images that a run will evaluate on can be read: found out beside training, not after it."""

import threading
from concurrent.futures import Future

from mpanet_jax.data.decode import encoded_image
from mpanet_jax.datasets.schema import Split


class RecordCheck:
    """Reads every record of some splits in the background; array_record checks its blocks as it reads them."""

    def __init__(self, *splits: Split):
        self._result: Future[None] = Future()
        threading.Thread(target=self._run, args=splits, daemon=True).start()  # the run may end before

    def _run(self, *splits: Split) -> None:
        try:
            for split in splits:
                for i in range(len(split)):
                    encoded_image(split, i)
            self._result.set_result(None)
        except BaseException as error:
            self._result.set_exception(error)

    def require(self) -> None:
        """Returns once all records have been read; raises `UserError`, which names an image, where one is damaged."""
        self._result.result()
