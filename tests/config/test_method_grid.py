"""Overrides with several values, as methods of one model."""

from __future__ import annotations

import pytest

import vzip
from vzip.config.method_grid import method_grid
from vzip.errors import ConfigError


def test_a_grid_is_each_combination_once_and_of_one_model() -> None:
    grid = method_grid(["compressor=visionzip,divprune", "budget=full,64tok,32tok"])
    rows = [(each.method, each.budget) for each in grid.methods]
    assert rows == [("none", "full"), *((name, b) for name in ("visionzip", "divprune") for b in ("64tok", "32tok"))]
    assert [getattr(each.compressor, "budget", None) for each in grid.methods[1:3]] == [
        vzip.TokenBudget(54, 10),
        vzip.TokenBudget(27, 5),
    ]
    assert grid.model_name == "tiny"
    with pytest.raises(ConfigError, match="cannot be compared in one run"):
        method_grid(["model.dtype=float32,float16"])
