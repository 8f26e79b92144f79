"""`python -m vzip view`: what it writes, and what it refuses before it opens or loads anything."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.report.view.view_runs import COMPRESSED, VANILLA, put, row

import vzip
from vzip import cli
from vzip.analysis.kept import kept_crop
from vzip.cli.view import _of_folder as view_of_folder
from vzip.config.build import recorded_method
from vzip.errors import ConfigError, ImageError
from vzip.results.record import read_record

SCENE = Path(__file__).resolve().parents[2] / "docs" / "scene.png"


def written(page: Path) -> dict[str, Any]:
    found = re.search(r'id="content">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    rows = [row(n, n != 2, question_id=f"id-{n}") for n in range(6)]
    other = [row(n, n != 3, question_id=f"id-{n}") for n in range(6)]
    return put(tmp_path / "runs/a", COMPRESSED, rows), put(tmp_path / "runs/b", VANILLA, other)


def test_a_dot_in_an_id_is_no_ending(tmp_path: Path) -> None:
    images, rows = tmp_path / "images", [row(n, True, question_id=f"1.{n}") for n in range(3)]
    images.mkdir()
    Image.new("RGB", (20, 20)).save(images / "1.png")
    Image.new("RGB", (30, 20)).save(images / "1.2.png")
    out = tmp_path / "view.html"
    command = ["view", str(put(tmp_path / "runs/a", VANILLA, rows)), "--out", str(out), "--images", str(images)]
    assert cli.main(command) == 0
    content = written(out)
    # Of question 1.1 there is none but by its doc_id, 1.
    assert [len(one["views"]) for one in content["samples"]] == [0, 1, 1]
    assert [image["width"] for image in content["images"]] == [20, 30]


def test_images_in_folders_of_their_own(tmp_path: Path) -> None:
    ids = ["coco/train/1.jpg", "b/1", "flat/2", "7", "8", "9"]
    sides = {"coco/train/1.png": 11, "made_up/b/1.png": 12, "2.png": 13, "made_up/x/y/7.png": 14}
    sides |= {"made_up/x/8.png": 15, "made_up/y/8.png": 16, "other/9.png": 17, "made_up/coco/1.png": 18}
    images = tmp_path / "images"
    for name, side in sides.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, 5)).save(images / name)
    source = view_of_folder(images)
    found = []
    for one in ids:
        try:
            found.append(source({"task": "made_up", "question_id": one, "doc_id": 0})[0].width)
        except ImageError as error:
            assert "no file named" in str(error)
            found.append(None)
    assert found == [11, 12, 13, 14, None, None], "8 is there twice, 9 another task's"


def test_images_by_name_with_the_runs_own_kept_patches(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    (images / "made_up").mkdir(parents=True)
    shutil.copy(SCENE, images / "id-2.png")
    shutil.copy(SCENE, images / "made_up/3.png")
    Image.new("RGB", (20, 20)).save(images / "3.png")  # the task's own folder comes first
    (images / "5.png").write_text("no image")
    out = tmp_path / "pages/view.html"
    assert cli.main(["view", *map(str, runs), "--out", str(out), "--images", str(images)]) == 0
    told = capsys.readouterr().out
    assert "6 questions, 1 only vanilla right, 1 only compressed right, 2 with an image" in told

    content = written(out)
    samples = content["samples"]
    assert [one["id"] for one in samples] == [f"id-{n}" for n in range(6)]
    assert samples[2]["views"] == samples[3]["views"] and len(content["images"]) == 1
    assert "no file named" in samples[0]["note"] and "5.png" in samples[5]["note"]
    (view,) = samples[2]["views"]
    kept, of_vanilla = view["kept"]
    arguments, compressor = recorded_method(read_record(runs[0]))
    assert of_vanilla is None and "32" not in str(compressor.budget.num_dominant)
    vlm = vzip.load_vlm(**arguments, compressor=compressor)
    with Image.open(SCENE) as image:
        expected = kept_crop(vlm, image.convert("RGB"))
    assert kept["kept"] == np.flatnonzero(expected.kept).tolist() and kept["grid"] == [24, 24]
    assert [target for target, _ in kept["groups"]] == expected.targets and len(expected.targets) == 5
    for number, (_, members) in enumerate(kept["groups"]):
        assert members == np.flatnonzero(expected.group == number).tolist()


def test_without_kept_no_model_is_loaded(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", lambda **_: pytest.fail("loaded"))
    shutil.copy(SCENE, tmp_path / "2.png")
    out = tmp_path / "view.html"
    words = ["view", *map(str, runs), "--out", str(out), "--images", str(tmp_path), "--no-kept", "--limit", "1"]
    assert cli.main(words) == 0
    content = written(out)
    assert [bool(one["views"]) for one in content["samples"]] == [n == 2 for n in range(6)]
    assert content["samples"][2]["views"][0]["kept"] == [None, None]


def test_weights_that_are_not_the_runs_draw_nothing(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((runs[0] / "run.json").read_text())
    record["model"]["weights_sha256"] = "0" * 64
    (runs[0] / "run.json").write_text(json.dumps(record))
    out = tmp_path / "view.html"
    assert cli.main(["view", str(runs[0]), "--out", str(out), "--images", str(tmp_path)]) == 0
    assert "kept patches are not drawn: the weights in" in capsys.readouterr().out


def test_images_that_are_not_at_hand_are_told_once(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", lambda **_: pytest.fail("loaded"))
    for run in runs:
        record = json.loads((run / "run.json").read_text()) | {"include_path": "/their/tasks"}
        (run / "run.json").write_text(json.dumps(record))
    out = tmp_path / "view.html"
    assert cli.main(["view", *map(str, runs), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.count("its images are not at hand") == 1 and "Give --images DIR" in told
    assert not any(one["views"] for one in written(out)["samples"])


def test_what_is_wrong_is_said_at_once_and_nothing_is_written(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", lambda **_: pytest.fail("loaded"))
    run, empty = str(runs[0]), tmp_path / "empty"
    empty.mkdir()
    wrong = ["view", str(empty), "--out", str(tmp_path / "x.txt"), "--images", "nowhere", "--limit", "-1"]
    assert cli.main(wrong) == 2
    told = capsys.readouterr().err
    for words in ("holds no run.json", "ends in .html", "nowhere: no such folder", "--limit -1"):
        assert words in told
    assert cli.main(["view", run, str(tmp_path / "gone"), "--out", str(tmp_path / "x.html")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (there := tmp_path / "there.html").write_text("mine")
    assert cli.main(["view", run, "--out", str(there)]) == 2
    assert "--overwrite" in capsys.readouterr().err and there.read_text() == "mine"
    words = ["--overwrite", "--no-kept", "--images", str(tmp_path)]
    assert cli.main(["view", run, "--out", str(there), *words]) == 0
    assert there.read_text() != "mine"
    capsys.readouterr()
    folder = tmp_path / "folder.html"
    folder.mkdir()
    assert cli.main(["view", run, "--out", str(folder)]) == 2 and "is a folder" in capsys.readouterr().err
    others = put(tmp_path / "c", VANILLA, [row(n, True, task="another") for n in range(2)])
    assert cli.main(["view", run, str(others), "--out", str(tmp_path / "x.html")]) == 2
    told = capsys.readouterr().err
    assert "made_up (6 questions)" in told and "another (2 questions)" in told and not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    "method",
    [
        {"name": "visionzip", "_target_": "os.system", "command": "touch ran"},
        {
            "name": "visionzip",
            "_target_": "vzip.VisionZip",
            "budget": {"_target_": "builtins.print", "_args_": ["ran"]},
        },
    ],
)
def test_a_record_from_elsewhere_makes_nothing_but_methods(
    runs: tuple[Path, Path], method: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_record(runs[0])
    record["config"]["compressor"] = method
    with pytest.raises(ConfigError, match=r"which no file of configs/compressor names"):
        recorded_method(record)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no configuration"):
        recorded_method(record | {"config": None})
    record["config"] = {"model": {}, "compressor": {"_target_": "vzip.Identity"}}
    with pytest.raises(ConfigError, match="not one of this version"):
        recorded_method(record)
