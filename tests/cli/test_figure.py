"""`python -m vzip figure`: files and their caption, and what is refused before anything is loaded."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from scripts.make_random_model import build
from tests.media.clips import write
from tests.records import put, record

import vzip
from vzip import cli
from vzip.cli import figure
from vzip.config.options import config_dir
from vzip.errors import ManifestError
from vzip.report.figures.drawing import Drawing

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
        "There are: 1, ": ["99"],
        "python eval.py -m model=tiny compressor": ["4"],
        "no option of figure 4": ["4", "--limit", "3"],
        "no option of figure 7": ["7", "--runs", "runs"],
        "sets the methods itself": ["7", "budget=32tok"],
        "go together": ["7", "--prompts", "one.txt"],
        "must come in pairs": ["7", "--images", str(SCENE.parent), "--prompts", "one.txt"],
        "--limit=0": ["7", "--limit", "0"],
        "figure 1 needs tiny without compression": ["1"],
        "no option of figure 8": ["8", "--images", "photos"],
        "--video and --prompt go together": ["8", "--video", "clip.mp4"],
        "--video absent.mp4: no such file": ["8", "--video", "absent.mp4", "--prompt", "what?"],
        "figure 8 sets the methods itself": ["8", "compressor=divprune"],
        "needs --video FILE and --prompt TEXT": ["8", "model=video_llava_7b"],
        "figure 8 of the built-in model sets it": ["8", "budget=32tok"],
        "model=absent": ["7", "model=absent"],
    }
    for text, words in refused.items():
        assert cli.main(["figure", *words]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def scenes(compressor: str, num_tokens: int, scores: list[float], **change: Any) -> dict[str, Any]:
    tasks = [f"scenes_{name}" for name in ("existence", "attributes", "counting", "reading")]
    entry = {"primary_metric": "m", "unit": "fraction", "chance": None, "num_samples": 50}
    metrics = [{"m": {"value": score, "standard_error": 0.01, "standard_error_source": "x"}} for score in scores]
    counts = {"budget_per_crop": num_tokens, "measured_min": num_tokens, "measured_max": num_tokens, "num_images": 9}
    return record(
        compressor,
        visual_tokens=counts,
        tasks={task: {**entry, "metrics": own} for task, own in zip(tasks, metrics, strict=True)},
        data={task: {"questions_sha256": task} for task in tasks},
        **{**TINY, **change},
    )


def test_figure_1_reads_records_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "vanilla", scenes("Identity", 576, [0.9, 0.8, 0.7, 1.0]), [1.0])
    put(tmp_path, "ours", scenes("VisionZip", 64, [0.9, 0.4, 0.7, 0.5], tower_cache={"num_hits": 9}), [1.0])
    words = ["figure", "1", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "tiny with 64 visual tokens" in told and "scenes_reading (50)" in told
    assert (
        "python -m vzip bench model=tiny budget=64tok" in told
        and "python eval.py model=tiny compressor=none budget=full" in told
    )
    with (tmp_path / "out" / "figure_1.csv").open() as file:
        kept = [float(row["percent_of_vanilla"]) for row in csv.DictReader(file) if row["method"] == "VisionZip"]
    assert kept == pytest.approx([100, 50, 100, 50])


def test_all_draws_what_it_can_keeps_what_is_there_and_names_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, argparse.Namespace] = {}

    def drawn(number: str, args: argparse.Namespace) -> Drawing:
        given[number] = args
        if number == "10":
            raise ManifestError("no records: do this")
        return Drawing(Figure(), [{"number": number}], f"caption {number}")

    figures = {
        number: figure.FigureCommand(partial(drawn, number), frozenset(options))
        for number, options in {"10": [], "9": ["limit"], "2": ["runs"], "11": []}.items()
    }
    monkeypatch.setattr(figure, "FIGURES", figures)
    words = ["figure", "all", "model=tiny", "--limit", "3", "--out", str(tmp_path)]
    assert cli.main(words) == 1
    told = capsys.readouterr()
    assert [line for line in told.err.splitlines() if line.startswith("figure")] == [
        "figure 2 (1 of 4)",
        "figure 9 (2 of 4)",
        "figure 10 (3 of 4)",
        "figure 11 (4 of 4)",
        "figure 10: no records: do this",
    ]
    assert told.out.splitlines()[-1] == "3 figures drawn, 0 kept, 1 not drawn"
    assert given["9"].limit == 3 and given["2"].limit is None and given["9"].settings == ["model=tiny"]
    given.clear()
    assert cli.main(words) == 1 and list(given) == ["10"], "what is there is kept"
    assert "3 kept" in capsys.readouterr().out
    figures.pop("10")
    assert cli.main([*words, "--overwrite"]) == 0 and list(given) == ["10", "2", "9", "11"]


@pytest.mark.slow
def test_figure_8_on_a_video_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "clip.mp4", 30)
    model, processor = build("video_llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    words = [
        "figure",
        "8",
        "model=video_llava_7b_hf",
        f"model.name_or_path={tmp_path / 'model'}",
        "model.revision=null",
    ]
    words += ["model.num_tower_tokens=null", "--video", str(tmp_path / "clip.mp4"), "--prompt", "What happens?"]
    assert cli.main([*words, "--max-new-tokens", "3", "--out", str(tmp_path)]) == 0
    with (tmp_path / "figure_8.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["vanilla", "VisionZip, as few", "VisionZip"]
    tokens = [int(row["num_visual_tokens"]) for row in rows]
    assert tokens[1] == 8 * 17 and tokens[0] - 17 < tokens[2] <= tokens[0]
    assert "clip.mp4 of 30 frames, one question" in capsys.readouterr().out
