"""Engines that several tests ask."""

from __future__ import annotations

import pytest
from tests.serving.end_to_end import engines

import vzip
from vzip.models.hub import built_in_folder

TINY = str(built_in_folder())


@pytest.fixture(scope="session")
def tiny_path() -> str:
    return TINY


@pytest.fixture(scope="session")
def tiny_engine():
    """The built-in model at 64 tokens."""
    return engines.start(TINY)


@pytest.fixture
def tiny_vlm():
    """The same by ``CompressedVlm``."""
    return vzip.load_vlm("vzip/tiny", compressor=vzip.VisionZip(vzip.TokenBudget(**engines.BUDGET)))
