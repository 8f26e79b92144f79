"""The plan of the batches, and the work done ahead."""

from __future__ import annotations

import random
import threading
import time

import pytest

from vzip.evaluation.answering.batching import cut, plan_sections
from vzip.evaluation.answering.read_ahead import prepare_ahead


def plan_batches(lengths: list[int], groups: list[str], size: int) -> list[list[int]]:
    """The batches of questions whose images are all different."""
    return [batch for section in plan_sections(lengths, groups, range(len(lengths)), size) for batch in section]


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


class TestSections:
    """The questions about an image near each other."""

    @pytest.mark.parametrize("size", [1, 2, 8, 64])
    def test_no_image_is_in_two_of_them(self, size):
        draw = random.Random(size)
        images = [image for image in range(150) for _ in range(draw.choice([1, 3, 4]))]
        draw.shuffle(images)
        lengths, groups = [draw.randrange(5, 30) for _ in images], [image % 2 for image in images]
        plan = plan_sections(lengths, groups, images, size)
        flat = [position for section in plan for batch in section for position in batch]
        assert sorted(flat) == list(range(len(images)))
        of_sections = [{images[position] for batch in section for position in batch} for section in plan]
        assert sum(map(len, of_sections)) == 150, "an image is in one section alone"
        assert all(len(own) <= 2 * size for own in of_sections), "two passes of the vision tower"
        for section in plan:
            mine = [lengths[position] for batch in section for position in batch]
            assert mine == sorted(mine, reverse=True) and all(len(batch) == size for batch in section[:-1])
        if size == 8:  # batches that are not full cost as much as full ones
            assert sum(map(len, plan)) <= 1.08 * len(images) / size
        longest = [max(lengths[position] for batch in s for position in batch) for s in plan if groups[s[0][0]] == 0]
        assert longest == sorted(longest, reverse=True)

    def test_an_image_that_everything_is_about_does_not_make_one_section_of_all(self):
        plan = plan_sections([5] * 100, ["a"] * 100, ["one image"] * 100, 4)
        assert [sum(map(len, section)) for section in plan] == [16] * 6 + [4]

    def test_alone_each_is_a_batch(self):
        assert plan_sections([1, 2, 3], ["a"] * 3, "xyz", 2) == [[[2, 1]], [[0]]]
        assert plan_sections([1, 2, 3, 4], ["a"] * 4, "xyxy", 2) == [[[3, 2], [1, 0]]]


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
