"""Shared fixtures. One thread: tests are small, and results must not depend on the machine's core count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import PIL
import pytest
import torch

torch.set_num_threads(1)

# With it the golden images agree to 2e-6; 12.3 resizes up to 0.128 apart after normalisation.
GOLDEN_PILLOW = "13.0.0"


@pytest.fixture(scope="session")
def names_pillow() -> Callable[[str], str]:
    """For ``assert_close(msg=)`` on golden images: which Pillow they hold for, and which is installed."""
    return lambda message: f"golden images hold for Pillow {GOLDEN_PILLOW}, installed is {PIL.__version__}: {message}"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; see tests/golden/README.md."""
    return Path(__file__).parent / "golden"
