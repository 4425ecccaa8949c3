"""How the steps of a run are cut into calls of the compiled program, and the batches of a call."""

import math
from collections.abc import Iterator

import numpy as np


def cut_into_calls(
    first_step: int, total_steps: int, steps_per_call: int, stops: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """How the steps are cut into calls: pairs (steps done before the call, steps done after it).

    No call runs past the end or past a multiple of one of the `stops` (0: none). The most that a call can take is
    `steps_per_call` or, if that is less, the shortest way between two stops of a kind. All calls have one length, the
    largest up to that which divides end and stops, so one program is compiled. Where that is less than a third of the
    most, calls take the most, and one step where so many do not fit: two programs. What a call holds depends on its
    place alone, so a run resumed at a stop goes on with the same programs.
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


def stack_batches(batches: Iterator[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """The next `count` batches, stacked."""
    taken = [next(batches) for _ in range(count)]
    if count == 1:  # without a copy of the images
        return {name: rows[None] for name, rows in taken[0].items()}
    return {name: np.stack([batch[name] for batch in taken]) for name in taken[0]}
