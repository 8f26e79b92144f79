"""A scenes benchmark of six images, written out as the real one is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from vzip.demo import benchmark


@pytest.fixture(scope="session")
def small_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first six images of the benchmark with their questions and task files."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "NUM_IMAGES", 6)
        benchmark.write(folder)
    benchmark.write_tasks(folder)
    return folder
