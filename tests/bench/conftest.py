"""A small LLaVA and small towers for the bench, built from configurations with its own random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import tiny, tiny_mini_gemini

from vzip.bench import workload
from vzip.bench.settings import BenchSettings
from vzip.bench.shapes import BenchModel
from vzip.bench.workload import Workload

BUDGET = "12+4"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint of a small LLaVA, 64 patches."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny.llava().save_pretrained(directory)
    return directory


def bench_model(tower: Any = "clip", strategy: Any = "default", family: str = "llava") -> BenchModel:
    """A family's small model as the bench sees it."""
    build_model = {"mini_gemini": tiny_mini_gemini.mini_gemini}.get(family) or getattr(tiny, family)
    return BenchModel("small", build_model(tower, strategy).config, checkpoint="")


def build(model: BenchModel, **settings: Any) -> Workload:
    """A workload with random weights on the CPU."""
    chosen = BenchSettings(**{"budget": BUDGET, "device": "cpu", "prompt_tokens": 7, "num_new_tokens": 3, **settings})
    workload.check(chosen, model)
    return workload.build(chosen, model)


@pytest.fixture(scope="session")
def clip_tower() -> BenchModel:
    """A CLIP tower alone."""
    return BenchModel("tower", tiny.vision_config("clip"), checkpoint="")
