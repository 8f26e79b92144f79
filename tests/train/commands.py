"""train.py and eval.py on a checkpoint and data of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from tests import tiny
from tests.config.kit import script

from vzip.config.options import config_dir


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny random checkpoint (``model``), eight samples in LLaVA's format, and the words that name both."""
    processor = tiny.processor()
    tiny.llava(vocab_size=len(processor.tokenizer)).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    records: list[dict[str, Any]] = []
    for number in range(8):
        Image.new("RGB", (30, 20), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": f"{number}"}]
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VZIP_CACHE", str(tmp_path / "cache"))
    return [
        "model=llava_local",
        f"model.name_or_path={tmp_path / 'model'}",
        "budget.num_dominant=6",
        "budget.num_contextual=3",
        "data=llava_json",
        "data.json=data.json",
        "train=projector",
        "train.samples_per_step=4",
        "train.precision=float32",
        "train.learning_rate=0.01",
        "launcher.device=cpu",
    ]


def composed(words: list[str], primary: str = "train") -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(primary, words)


def run(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    try:
        script(name).main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
