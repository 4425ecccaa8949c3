"""The next call's batches are made ready while one is under way, and a checkpoint's position does not run ahead."""

import threading
from functools import partial
from itertools import count

import numpy as np
import pytest

from mpanet_jax.background import Ahead, InBackground
from mpanet_jax.call_plan import CallBatches
from mpanet_jax.errors import UserError


class Numbered:
    """Batches 0, 1, 2, …; batch `bad` cannot be read."""

    def __init__(self, bad=None):
        self.next_index, self.bad = 0, bad

    def __iter__(self):
        return self

    def __next__(self):
        if self.next_index == self.bad:
            raise UserError(f"batch {self.bad} is bad")
        self.next_index += 1
        return {"labels": np.array([self.next_index - 1])}

    def get_state(self):
        return {"next_index": self.next_index}


def test_calls_get_their_batches_and_the_position_is_that_of_the_calls():
    made = []
    calls = CallBatches(Numbered(), lambda batches: made.append(threading.current_thread()) or batches, iter(CALLS))
    assert calls.get_state() == {"next_index": 0}
    for (before, after), (first, end, batches) in zip(CALLS, calls, strict=True):
        assert (first, end) == (before, after)
        np.testing.assert_array_equal(batches["labels"], np.arange(before, after)[:, None])
        calls._ahead._next.exception()  # waits: the next call is ready, or there is none
        assert calls.get_state() == {"next_index": after}
    calls.close()
    assert len(made) == len(CALLS) and threading.current_thread() not in made


CALLS = [(0, 3), (3, 6), (6, 7)]


def test_a_batch_that_cannot_be_read_is_named_when_its_call_comes():
    calls = CallBatches(Numbered(bad=4), lambda batches: batches, iter(CALLS))
    assert next(calls)[:2] == (0, 3)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^batch 4 is bad$"):
            next(calls)
    assert calls.get_state() == {"next_index": 3}
    calls.close()


def test_the_next_element_is_made_meanwhile_and_no_more():
    made, begun, go_on = [], threading.Semaphore(0), threading.Semaphore(0)

    def element(i):
        begun.release()
        assert go_on.acquire(timeout=60)
        made.append(i)
        return i

    with Ahead(map(element, count())) as ahead:
        go_on.release()
        assert next(ahead) == 0 and made == [0]
        go_on.release()
        assert ahead._next.result(timeout=60) == 1 and made == [0, 1]
        assert next(ahead) == 1
        assert all(begun.acquire(timeout=60) for _ in range(3))
        go_on.release()  # the end of the context waits for element 2
    assert made == [0, 1, 2]


def test_the_end_is_the_end():
    with Ahead(iter("ab")) as ahead:
        assert list(ahead) == ["a", "b"] and list(ahead) == []


def test_a_function_is_called_once_and_what_it_held_is_let_go():
    class Large:
        pass

    def function(held):
        called.append(type(held))
        if len(called) > 1:
            raise UserError("no second time")
        return len(called)

    called: list[type] = []
    background = InBackground(partial(function, Large()), cut_off=False)
    for _ in range(2):
        background.wait()
        assert background.result() == 1
    assert called == [Large] and background._function is None
    failing = InBackground(partial(function, Large()))
    failing.wait()
    with pytest.raises(UserError, match="no second time"):
        failing.result()
