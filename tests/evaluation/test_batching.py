"""The plan of the batches, and the work done ahead."""

from __future__ import annotations

import random
import threading
import time

import pytest

from vzip.evaluation.answering.batching import cut, plan_batches
from vzip.evaluation.answering.read_ahead import prepare_ahead


def test_longest_first_within_a_group():
    assert plan_batches([3, 9, 3, 7, 5], ["a", "b", "a", "a", "b"], 2) == [[3, 0], [2], [1, 4]]
    assert plan_batches([], [], 2) == []


def test_every_question_once_and_never_two_groups_together():
    draw = random.Random(0)
    lengths = [draw.randrange(20) for _ in range(101)]
    groups = [draw.choice("abc") for _ in range(101)]
    for size in (1, 4, 7, 200):
        batches = plan_batches(lengths, groups, size)
        assert sorted(position for batch in batches for position in batch) == list(range(101))
        for batch in batches:
            assert len({groups[position] for position in batch}) == 1 and len(batch) <= size
        for group in "abc":
            mine = [position for batch in batches for position in batch if groups[position] == group]
            assert mine == sorted(mine, key=lambda position: (-lengths[position], position))


def test_cut():
    assert cut([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_keep_their_order(num_workers):
    def prepare(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(prepare_ahead(range(20), prepare, num_workers)) == [number * number for number in range(20)]


def test_threads_run_ahead_but_not_far():
    started: list[int] = []
    gate = threading.Event()

    def prepare(number: int) -> tuple[int, str]:
        started.append(number)
        if number == 1:
            gate.wait(10)
        return number, threading.current_thread().name

    results = prepare_ahead(range(100), prepare, 2)
    number, thread = next(results)
    assert number == 0 and thread.startswith("prepare")
    deadline = time.monotonic() + 10
    while len(started) < 5 and time.monotonic() < deadline:  # the other thread goes on while one is held up
        time.sleep(0.001)
    assert sorted(started) == [0, 1, 2, 3, 4]  # the one taken, and twice as many as there are threads
    gate.set()
    results.close()
    assert len(started) < 10, "what waits is dropped with the generator"


def test_an_error_comes_with_its_own_item():
    def prepare(number: int) -> int:
        if number == 3:
            raise ZeroDivisionError(f"at {number}")
        return number

    taken = []
    with pytest.raises(ZeroDivisionError, match="at 3"):
        for result in prepare_ahead(range(10), prepare, 2):
            taken.append(result)
    assert taken == [0, 1, 2]
