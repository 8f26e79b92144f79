"""PyramidDrop's and VScan's own arguments and a case by hand; the rest stands in test_oracle.py and test_pruning.py."""

from __future__ import annotations

import pytest
from tests.pruners.states import State, rows

import vzip
from vzip.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"layers": [0, 8], "keep": [2, 1]}, ["pruner.layers=[0, 8]: must be whole numbers, 1 or more, in ascending"]),
        ({"layers": [8, 2], "keep": [2, 1]}, ["pruner.layers=[8, 2]"]),
        ({"layers": [2, 2], "keep": [2, 1]}, ["pruner.layers=[2, 2]"]),
        ({"layers": [], "keep": []}, ["pruner.layers=[]"]),
        ({"layers": "8"}, ["pruner.layers=['8']"]),
        ({"keep": [0.5, 0.25]}, ["pruner.keep=[0.5, 0.25]: must be as many numbers as pruner.layers=[8, 16, 24] has"]),
        ({"keep": [0.5, 0.25, 9]}, ["pruner.keep=[0.5, 0.25, 9]: must be whole numbers", "all of one kind"]),
        ({"keep": [3, 2, 0]}, ["pruner.keep=[3, 2, 0]"]),
        ({"keep": [3, 2, True]}, ["pruner.keep=[3, 2, True]"]),
        ({"keep": [1.5, 0.25, 0.125]}, ["pruner.keep=[1.5, 0.25, 0.125]"]),
        ({"keep": [0.25, 0.5, 0.125]}, ["pruner.keep=[0.25, 0.5, 0.125]: must not rise"]),
        ({"layers": [1.5], "keep": [0.5, 2.0]}, ["pruner.layers=[1.5]", "must be whole", "must be as many"]),
    ],
)
def test_wrong_arguments_are_named_all_at_once(arguments, messages):
    with pytest.raises(ConfigError) as error:
        vzip.PyramidDrop(**arguments)
    assert all(message in str(error.value) for message in messages)


def test_schedule_and_average():
    assert vzip.PyramidDrop().average(576, 32) == 270
    for keep, average in (
        ([0.5605, 0.3141, 0.1760], 191.9),
        ([0.421, 0.1772, 0.0746], 127.9),
        ([0.1927, 0.0371, 0.0071], 63.9),
    ):
        assert round(vzip.PyramidDrop([2, 8, 16], keep).average(576, 32), 1) == average
    assert vzip.PyramidDrop([1, 3], [9, 4]).schedule(6, 5) == [6, 6, 6, 4, 4]
    assert vzip.PyramidDrop(1, 0.29).schedule(100, 2) == [100, 29]  # 28.999999999999996 in floating point
    assert [vzip.VScanStage2(16, keep).average(3 * keep, 32) for keep in (32, 64, 96)] == [64, 128, 192]


def test_two_images_by_hand():
    """Tokens: text, two of each image, text. The last token looks most at 1 and, with both heads together, at 4."""
    row = [[0.1, 0.4, 0.1, 0.2, 0.1, 0.1], [0.1, 0.3, 0.2, 0.1, 0.3, 0.0]]
    state = State(8, [-1, 0, 0, 1, 1, -1], [rows({5: head}, 6) for head in row])
    for keep in (1, 0.5):
        cut = vzip.PyramidDrop(8, keep).cut(state)
        assert (cut.index.tolist(), cut.positions, cut.new_rows) == ([0, 1, 4, 5], "repacked", None)
    assert {*state.layers_read} == {8}
    cut = vzip.PyramidDrop(8, 2).cut(state)
    assert (cut.index.tolist(), cut.positions) == ([0, 1, 2, 3, 4, 5], "original")


def test_equal_scores_keep_the_first():
    state = State(1, [-1, 0, 0, 0, 0, -1], [rows({5: [0.2, 0.1, 0.1, 0.1, 0.1, 0.4]}, 6)])
    assert vzip.VScanStage2(1, 2).cut(state).index.tolist() == [0, 1, 2, 5]
