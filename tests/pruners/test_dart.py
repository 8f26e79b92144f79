"""DART's own arguments and a case by hand; what it computes stands in test_oracle.py and test_pruning.py."""

from __future__ import annotations

import pytest
from tests.pruners.states import State

import vzip
from vzip.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"K": 0}, ["pruner.K=0: must be a whole number, 1 or more"]),
        ({"num_claimed": 7}, ["pruner.num_claimed=7: must be at least one for each", "pruner.num_image_pivots=4"]),
        ({"num_image_pivots": 0, "num_text_pivots": 0}, ["of which there must be one"]),
        (
            {"K": True, "num_claimed": 8.0, "num_image_pivots": -1, "num_text_pivots": "4"},
            ["K=True", "num_claimed=8.0", "num_image_pivots=-1", "num_text_pivots='4'"],
        ),
    ],
)
def test_wrong_arguments_are_named_all_at_once(arguments, messages):
    with pytest.raises(ConfigError) as error:
        vzip.DART(**arguments)
    assert all(message in str(error.value) for message in messages)


def test_image_pivots_come_on_top_and_claims_are_rounded_down():
    assert vzip.DART().schedule(576, 4) == [576, 576, 132, 132]
    assert vzip.DART(1, 13, 3, 2).schedule(576, 3) == [576, 13, 13]
    assert vzip.DART(2, 128).schedule(100, 3) == [100, 100, 100]


def test_two_images_by_hand():
    """Of each image one pivot and, as it is followed by text, one claim by it and one by a word.

    Image 0 (1 to 4): pivot 2 (norm 6). Word 10 (norm 9) claims first: least like (0, 1) is 4, (1, -1); the pivot (1, 0)
    then claims, of 1, (-1, 1), and 3, (1, 1), token 1. Image 1 (6 to 9): pivot 9; the word claims 6, the pivot 7.
    """
    keys = [0, 1, 6, 2, 3, 8, 1, 1, 1, 5, 9]
    hidden = [[1, 0], [-1, 1], [1, 0], [1, 1], [1, -1], [0, -5], [1, -2], [-2, 1], [1, 1], [3, 1], [0, 1]]
    owner = [-1, 0, 0, 0, 0, -1, 1, 1, 1, 1, -1]
    pruner = vzip.DART(3, 2, 1, 1)
    state = State(3, owner, keys=[[[-0.5 * key] for key in keys], [[0.5 * key] for key in keys]], hidden=hidden)
    cut = pruner.cut(state)
    assert cut.index.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10]
    assert cut.positions == "original" and state.layers_read == [2]
    assert pruner.schedule(4, 4) == [4, 4, 4, 3]


def test_claims_of_text_that_there_is_not_fall_to_the_pivots_that_there_are():
    hidden = [[1, 0], [1, 0], [1, 0.1], [1, 0.2], [1, 0.3], [1, 0.4], [1, 0]]
    state = State(1, [-1, 0, 0, 0, 0, 0, -1], keys=[[[9], [8], [1], [1], [1], [1], [2]]], hidden=hidden)
    pruner = vzip.DART(1, 3, 1, 2)
    # Three claims, two pivots: 1 takes two (5 and 4), the word one (3).
    assert pruner.cut(state).index.tolist() == [0, 1, 3, 4, 5, 6]
    assert pruner.schedule(5, 2) == [5, 4]
