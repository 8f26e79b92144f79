"""Shared fixtures. One thread: tests are small, and results must not depend on the machine's core count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; see tests/golden/README.md."""
    return Path(__file__).parent / "golden"
