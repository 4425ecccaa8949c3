"""Cuts the steps of a run into calls of the compiled program, and makes the batches of a call ready."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from mpanet_jax.background import Ahead

SENT_STEPS, SENT_BYTES = 5, 2**27


def most_steps_of_a_call(steps_per_call: int, sent_bytes: int) -> int:
    """The most steps that one call of the compiled program should take.

    Between two calls an accelerator has a gap of about a millisecond. Batches that bring their images with them have to
    be copied and sent before their call, so a call takes SENT_STEPS of these at most, and SENT_BYTES unless one is
    larger. On the CPU it takes one: inside a loop of steps XLA runs convolutions on one thread.

    Args:
      steps_per_call: settings.train.steps_per_call.
      sent_bytes: of the images that this process sends with a batch; 0 if the device has them all.
    """
    if not sent_bytes:
        return steps_per_call
    return 1 if jax.default_backend() == "cpu" else min(steps_per_call, SENT_STEPS, max(1, SENT_BYTES // sent_bytes))


def cut_into_calls(
    first_step: int, total_steps: int, steps_per_call: int, stops: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """Cuts steps into calls, so that few programs are compiled: each length of a call is a program of its own.

    A call takes at most L steps: the least of `steps_per_call`, the `stops` and `total_steps`. If a length greater than
    1 and at least L/3 divides the total and the stops, all calls have the greatest such length: one program. Otherwise
    calls take L steps, and single steps where L do not fit before the next stop: two programs. The calls after a stop
    do not depend on those before it, so a resumed run uses the same programs.

    Args:
      first_step: the steps done before.
      total_steps: the steps done at the end.
      steps_per_call: the most steps of a call.
      stops: no call runs past a multiple of any of them; 0: no stops of this kind.

    Yields:
      (steps done before the call, steps done after it).
    """
    stops = (total_steps, *(every for every in stops if every))
    at_most = min(steps_per_call, *stops)
    even = max(n for n in range(1, at_most + 1) if math.gcd(*stops) % n == 0)
    length = even if 1 < even >= at_most / 3 else at_most
    step = first_step
    while step < total_steps:
        limit = min(total_steps, *(step // every * every + every for every in stops))
        after = step + (length if step + length <= limit else 1)
        yield step, after
        step = after


def stack_batches(batches: Iterator[dict[str, np.ndarray]], count: int) -> dict[str, Any]:
    """The next `count` batches as one dict of arrays [count, …], but for `pixels`, of which it has a list."""
    taken = [next(batches) for _ in range(count)]
    pixels = {"pixels": [batch["pixels"] for batch in taken]} if "pixels" in taken[0] else {}
    others = [name for name in taken[0] if name != "pixels"]
    if count == 1:  # a view: stacking would copy the images
        return {name: taken[0][name][None] for name in others} | pixels
    return {name: np.stack([batch[name] for batch in taken]) for name in others} | pixels


class CallBatches:
    """The batches of a run's calls; those of the next call are made ready by a thread, while one is under way.

    On a GPU the thread that calls the compiled steps has little time for that: it comes back from a call shortly before
    the call is done. The first call's are begun when they are asked for.

    Args:
      batches: the run's.
      make_ready: of stacked batches what the compiled steps take.
      calls: what `cut_into_calls` yields.

    Yields:
      (steps done before a call, steps done after it, what it takes).
    """

    def __init__(
        self,
        batches: grain.DatasetIterator,
        make_ready: Callable[[dict[str, Any]], dict[str, Any]],
        calls: Iterator[tuple[int, int]],
    ):
        self._position = batches.get_state()
        self._made = (
            (before, after, make_ready(stack_batches(batches, after - before)), batches.get_state())
            for before, after in calls
        )
        self._ahead: Ahead | None = None

    def __iter__(self) -> "CallBatches":
        return self

    def __next__(self) -> tuple[int, int, dict[str, Any]]:
        self._ahead = self._ahead or Ahead(self._made)
        before, after, ready, self._position = next(self._ahead)
        return before, after, ready

    def get_state(self) -> dict[str, Any]:
        """The position of the batches after the calls that were handed out, for a checkpoint."""
        return self._position

    def close(self) -> None:
        """Waits for the call that is being made ready; then the batches may be closed."""
        if self._ahead:
            self._ahead.close()
