"""What a plan refuses before anything is read, begun or loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from vzip import installed
from vzip.config.build import evaluation_plan
from vzip.config.options import config_dir
from vzip.config.preview import brief
from vzip.config.training import checked, tuning_plan
from vzip.errors import ConfigError, MissingPackageError, RunWriteError
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


@pytest.mark.parametrize("group", ["compressor", "pruner"])
def test_a_methods_name_is_that_of_its_file(group: str) -> None:
    """Or its numbers would be filed as another's."""
    other = {"compressor": ("fastervlm", "visionzip"), "pruner": ("fastv", "none")}[group]
    for name, message in ((other[1], "the same"), ("fastvlm", r"must be the name of its file")):
        with pytest.raises(ConfigError, match=rf"{group}\.name={name}: .*{message}"):
            evaluation_plan(compose("eval", [f"{group}={other[0]}", f"{group}.name={name}"]))


def test_the_plan_tells_what_is_kept_as_the_method_counts_it(tmp_path: Path) -> None:
    told = {}
    for name in ("visionzip", "fastervlm", "divprune"):
        plan = evaluation_plan(compose("eval", [f"compressor={name}", f"paths.run_dir={tmp_path}"]))
        told[name] = brief(plan)
    assert "visionzip, 54 dominant + 10 contextual tokens a crop, 64 of 576" in told["visionzip"]
    assert "fastervlm, 64 tokens a crop, 64 of 576" in told["fastervlm"]
    assert "divprune, 64 tokens a crop, over the whole image, 64 of 576" in told["divprune"]
