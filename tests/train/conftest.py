"""The plan of a tiny training, in the test's own directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.commands import words
from tests.train.kit import make_plan

from vzip.train.loop import TrainPlan

__all__ = ["plan", "words"]


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., TrainPlan]:
    """``make_plan`` into the test's own directory; ``name`` is the run's."""

    def make(name: str = "run", **changes: Any) -> TrainPlan:
        return make_plan(tmp_path / name, **changes)

    return make
