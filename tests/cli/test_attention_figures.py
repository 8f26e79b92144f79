"""`python -m vzip figure 2` and its kin: the built-in model by default, and what is refused before loading."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.analysis.towers import save, tower

import vzip
from vzip import cli
from vzip.cli import attention_figures
from vzip.config.options import config_dir
from vzip.errors import ConfigError

DOCS = config_dir().parent / "docs"


def test_the_built_in_model_on_its_own_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["figure", "14", "--limit", "2", "--pixel", "335,14", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "Vision tower of tiny (24 x 24 patches, 6 layers); 2 images of the built-in benchmark" in told
    assert "patch 1,23" in told and "by chance 12.5" in told
    with (tmp_path / "figure_14.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"] for row in rows if row["part"] == "distance_to_proxy"} == {str(n) for n in range(1, 7)}
    assert {row["image"] for row in rows if row["part"] == "map"} == {"0000.png", "0001.png"}


def test_what_is_wrong_is_said_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", None)
    refused = {
        "figure 2 shows the vision tower, before anything is compressed": ["2", "budget=32tok"],
        "--limit=0: must be 1 or more": ["5", "--limit", "0"],
        "no option of figure 5": ["5", "--patch", "1,2"],
        "--patch 3: must be ROW,COLUMN": ["6", "--patch", "3"],
        "--pixel -1,2: must be X,Y": ["14", "--pixel=-1,2"],
        "say the same twice": ["14", "--pixel", "1,2", "--patch", "1,2"],
        "no such folder": ["9", "--images", str(tmp_path / "absent")],
        "model=absent": ["9", "model=absent"],
        "holds no config.json": ["9", f"model={tmp_path}"],
        "model.dtype=float16: model=": ["9", f"model={tmp_path}", "model.dtype=float16"],
        "textvqa_val": ["2", "model=llava15_7b"],  # without a network
        "task 'absent_task' is not known": ["2", "eval.tasks=[absent_task]"],
    }
    for text, words in refused.items():
        assert cli.main(["figure", *words, "--out", str(tmp_path / "out")]) == 2, words
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_only_the_tower_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"model={save(tower('clip'), tmp_path / 'clip')}"
    refused = {
        "--patch 8,0: the tower has 8 rows and 8 columns": ["6", "--patch", "8,0"],
        "--pixel 0,112: outside": ["6", "--pixel", "0,112"],
        "--layer 9: the vision tower of clip has attention in layers 1 to 4": ["5", "--layer", "9"],
        "figure 11 shows images after the first 4": ["11", "--limit", "4"],
        "textvqa_val": ["2"],
    }
    for text, words in refused.items():
        data = [] if text == "textvqa_val" else ["eval=scenes"]
        assert cli.main(["figure", *words, model, *data, "--out", str(tmp_path / "out")]) == 2, words
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pixel_is_one_that_the_figure_shows() -> None:
    siglip = SimpleNamespace(grid=(27, 27), patch_size=14, image_size=384)  # 6 pixels belong to no patch
    assert attention_figures._patch(siglip, {"pixel": (377, 14), "patch": None}) == (1, 26)
    with pytest.raises(ConfigError, match=r"--pixel 378,0: outside.*378 x 378 pixels.*0 to 377,0 to 377 are allowed"):
        attention_figures._patch(siglip, {"pixel": (378, 0), "patch": None})
