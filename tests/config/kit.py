"""eval.py and train.py, called within a test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests import tiny

import vzip
from vzip.config.options import config_dir
from vzip.models import model_cache as reuse

ROOT = config_dir().parent
Run = Callable[..., tuple[int, str]]


def script(name: str) -> ModuleType:
    """``eval.py`` or ``train.py`` as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs eval.py or train.py in an empty directory, where loading a model is a failure."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(vzip, "load_vlm", refuse, raising=False)
    monkeypatch.setattr(reuse, "load_vlm", refuse)
    monkeypatch.chdir(tmp_path)

    def run(*words: str, name: str = "eval") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        try:
            script(name).main()
        except SystemExit as end:
            return int(end.code or 0), capfd.readouterr().err
        return 0, capfd.readouterr().err

    return run


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A tiny random checkpoint, a folder with one task, and the words that name both."""
    from PIL import Image

    datasets = pytest.importorskip("datasets")
    processor = tiny.processor()
    checkpoint = tmp_path / "my-checkpoint"
    tiny.llava(vocab_size=len(processor.tokenizer)).save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    tasks = tmp_path / "my-tasks"
    tasks.mkdir()
    rows = [{"image": Image.new("RGB", (30, 20), (60 * i, 0, 0)), "question": "red?", "answer": "no"} for i in range(3)]
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tasks / "rows.parquet")
    (tasks / "utils.py").write_text(
        "def visual(doc):\n    return [doc['image']]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
    )
    (tasks / "mine.yaml").write_text(
        f"task: mine\ndataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {tasks / 'rows.parquet'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: !function utils.text\ndoc_to_target: answer\ngeneration_kwargs: {max_new_tokens: 3}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    return [
        "eval.py",
        "model=llava_local",
        f"model.name_or_path={checkpoint}",
        f"eval.include_path={tasks}",
        "eval.tasks=[mine]",
        "eval.batch_size=2",
        "budget.num_dominant=6",
        "budget.num_contextual=2",
        "model.device_map=null",
        f"paths.runs_dir={tmp_path / 'runs'}",
    ]
