"""FastV's own arguments; what it computes stands in test_oracle.py and test_pruning.py."""

from __future__ import annotations

import pytest

import vzip
from vzip.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"K": 0}, ["pruner.K=0: must be a whole number, 1 or more"]),
        ({"K": True}, ["pruner.K=True"]),
        ({"keep": 0}, ["pruner.keep=0: must be a whole number of visual tokens an image, 1 or more"]),
        ({"keep": 1.5}, ["pruner.keep=1.5"]),
        ({"keep": True}, ["pruner.keep=True"]),
        ({"K": 2.0, "keep": "all", "pooled": 1}, ["pruner.K=2.0", "pruner.keep='all'", "pruner.pooled=1"]),
    ],
)
def test_wrong_arguments_are_named_all_at_once(arguments, messages):
    with pytest.raises(ConfigError) as error:
        vzip.FastV(**arguments)
    assert all(message in str(error.value) for message in messages)


def test_schedule_and_average():
    """The averages over 32 layers that the paper's budgets stand for (K=2: 166, 98 and 30 of 576)."""
    assert vzip.FastV(2, 30).schedule(576, 5) == [576, 576, 30, 30, 30]
    assert vzip.FastV(3, 0.5).schedule(577, 4) == [577, 577, 577, 288]
    assert vzip.FastV(2, 30).schedule(20, 3) == [20, 20, 20]
    assert [round(vzip.FastV(2, keep).average(576, 32)) for keep in (166, 98, 30)] == [192, 128, 64]
