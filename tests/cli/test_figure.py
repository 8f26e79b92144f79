"""`python -m vzip figure`: files and their caption, and what is refused before anything is loaded."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tests.records import put, record

import vzip
from vzip import cli
from vzip.config.options import config_dir

SCENE = config_dir().parent / "docs" / "scene.png"
TINY = {"config": {"recipe": None, "model": {"name": "tiny", "name_or_path": "vzip/tiny"}}}


def test_figure_4_writes_drawing_numbers_and_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "vanilla", record("Identity", **TINY), [1.0])
    put(tmp_path, "ours", record("VisionZip", **TINY), [1.0])
    put(tmp_path, "another", record("RandomTokens"), [1.0])  # of another model
    (tmp_path / "runs" / "cut").mkdir()
    (tmp_path / "runs" / "cut" / "run.json").write_text('{"kind": "eval')
    words = ["figure", "4", "eval.tasks=[gqa]", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert "primary score of tiny on gqa" in told.out
    assert f"left out: {tmp_path / 'runs' / 'cut' / 'run.json'} is not JSON" in told.err
    first = (tmp_path / "out" / "figure_4.svg").read_bytes()
    with (tmp_path / "out" / "figure_4.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["vanilla", "VisionZip"]
    with Image.open(tmp_path / "out" / "figure_4.png") as image:
        assert image.format == "PNG"
    assert cli.main(words) == 2
    assert "already holds figure_4.png" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    assert (tmp_path / "out" / "figure_4.svg").read_bytes() == first, "the same numbers, the same file"


def test_figure_7_asks_every_method_alone_and_as_a_second_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(SCENE, tmp_path / "photos" / "a.png")
    (tmp_path / "q.txt").write_text("What color is the star?\nWhat word is written on the sign?\n")
    words = ["figure", "7", "--images", str(tmp_path / "photos"), "--prompts", str(tmp_path / "q.txt")]
    assert cli.main([*words, "--max-new-tokens", "4", "--out", str(tmp_path)]) == 0
    with (tmp_path / "figure_7.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["vanilla", "VisionZip", "FastV", "SparseVLM"]
    assert [row["num_visual_tokens"] for row in rows] == ["576", "64", "576", "576"]
    assert float(rows[2]["mean_tokens"]) == (2 * 576 + 3 * 64) / 5 and rows[0]["alone"] == "air"
    assert "VisionZip: as vanilla in the same place" in capsys.readouterr().out


def test_what_is_wrong_is_said_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text(json.dumps("What?"))
    refused = {
        "There are: 2, 4, 5": ["99"],
        "python eval.py -m model=tiny compressor": ["4"],
        "no option of figure 4": ["4", "--limit", "3"],
        "no option of figure 7": ["7", "--runs", "runs"],
        "sets the methods itself": ["7", "budget=32tok"],
        "go together": ["7", "--prompts", "one.txt"],
        "must come in pairs": ["7", "--images", str(SCENE.parent), "--prompts", "one.txt"],
        "--limit=0": ["7", "--limit", "0"],
        "model=absent": ["7", "model=absent"],
    }
    for text, words in refused.items():
        assert cli.main(["figure", *words]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
