"""What a plan refuses before anything is read, begun or loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from vzip import installed
from vzip.config.build import evaluation_plan
from vzip.config.options import config_dir
from vzip.config.training import checked, tuning_plan
from vzip.errors import MissingPackageError, RunWriteError
from vzip.train.loop import prepare


@pytest.fixture(autouse=True)
def hydra_folder():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield


def test_quantization_without_bitsandbytes_and_a_folder_of_no_use_are_told_by_the_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before data is read, a directory begun or a model loaded."""
    (tmp_path / "file").touch()
    place = f"paths.run_dir={tmp_path / 'file' / 'run'}"
    with pytest.raises(RunWriteError, match="cannot be written"):
        evaluation_plan(compose("eval", [place]))
    plan = tuning_plan(checked(compose("train", ["+exp=tiny_64tok", place])))
    with pytest.raises(RunWriteError, match="cannot be written"):
        prepare(plan)
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda _name: None)
    quantized = "model.quantization=4bit"
    for ask in (
        lambda: evaluation_plan(compose("eval", [quantized])),
        lambda: checked(compose("train", ["+exp=tiny_64tok", quantized])),
    ):
        with pytest.raises(MissingPackageError, match=r"quantization=4bit needs the package bitsandbytes"):
            ask()
