"""`python -m vzip overlap` on the built-in model; what is wrong is said before it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import vzip
from vzip import cli
from vzip.analysis.kept_patches import kept_patches, patches_of_units
from vzip.cli.overlap import expected
from vzip.compressors.vision import VisionOutput, VisionShape
from vzip.config.build import model_plan
from vzip.config.options import config_dir

SCENE = config_dir().parent / "docs" / "scene.png"


def test_what_two_methods_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(SCENE, tmp_path / "a.png")
    with Image.open(SCENE) as scene:
        scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")
    (tmp_path / "cut.png").write_bytes(SCENE.read_bytes()[:2000])
    assert cli.main(["overlap", str(tmp_path), "compressor=visionzip,fastervlm,least_attended"]) == 0
    told = capsys.readouterr().out
    lines = [line.split() for line in told.splitlines() if "64tok" in line]
    assert "images: 2" in told and "left out: 1" in told and len(lines) == 3
    # VisionZip's 53 patches by CLS attention are among FasterVLM's 64; those attended to least are none of them.
    assert lines[0][:7] == ["visionzip", "64tok", "53", "fastervlm", "64tok", "64", f"{100 * 53 / 64:.1f}"]
    assert lines[1][6] == lines[2][6] == "0.0" and lines[2][-1] == "5.9"
    assert expected(64, 64, 576) == pytest.approx(0.0588, abs=1e-4)


def test_methods_that_plan_the_towers_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(SCENE, tmp_path / "a.png")
    assert cli.main(["overlap", str(tmp_path), "compressor=flowcut,resized,visionzip"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "64tok" in line]
    assert [(line[0], line[2], line[3], line[5]) for line in lines] == [
        ("flowcut", "64", "resized", "64"),
        ("flowcut", "64", "visionzip", "53"),
        ("resized", "64", "visionzip", "53"),
    ]


def test_methods_of_the_whole_image_name_the_same_patches() -> None:
    model, compressor = model_plan(["compressor=none", "budget=full"])
    vlm = vzip.load_vlm(**model, compressor=compressor)
    with Image.open(SCENE) as image:
        assert kept_patches(vlm, image.convert("RGB"), compressor) == (set(range(576)), 576)


def test_text_aware_methods_are_asked_and_methods_inside_the_tower_run_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(SCENE, tmp_path / "a.png")
    methods = "compressor=mmtok,flowcut,resized"
    shown = []
    for question in ("What is red?", "How many squares?"):
        assert cli.main(["overlap", str(tmp_path), methods, "--question", question]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if "64tok" in line]
        assert [line[2] for line in lines] == ["64"] * 3
        shown.append([line[6] for line in lines])
    assert shown[0][2] == shown[1][2], "those that read no text"
    assert shown[0][:2] != shown[1][:2]


def test_packed_units_are_patches_of_their_crops() -> None:
    shape = VisionShape("image", 2, (1, 3), True, 7, num_added=1)
    packing = torch.tensor([0, 1, 2, -1, 3, 4, 5])  # a newline between the crops
    packed = VisionOutput(torch.zeros(1, 7, 2), False, (1, 7))
    assert patches_of_units(packed, vzip.Identity(), shape, packing).tolist() == [[0, 1, 2, -1, 3, 4, 5]]
    with_cls = VisionShape("image", 2, (1, 3), True, 8)
    packed = VisionOutput(torch.zeros(1, 8, 2), False, (1, 8))
    expected = [[-1, 0, 1, 2, -1, 3, 4, 5]]
    assert patches_of_units(packed, vzip.Identity(), with_cls, None).tolist() == expected, "CLS is no patch"
    crops, method = VisionOutput(torch.zeros(2, 4, 2), True, (1, 3)), vzip.VisionZip(vzip.TokenBudget(1, 1))
    assert patches_of_units(crops, method, with_cls, None).tolist() == [[-1, 0, 1, 2], [-1, 3, 4, 5]]
    frames = VisionShape("video", 2, (1, 3), True, 8)
    method = vzip.VisionZip(vzip.TokenBudget(1, 1, scope="video"))
    packed = VisionOutput(torch.zeros(1, 8, 2), False, (1, 8))
    assert patches_of_units(packed, method, frames, None).tolist() == expected, "one budget for all frames"


def test_what_is_wrong_is_said_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", None)
    shutil.copy(SCENE, tmp_path / "a.png")
    refused = {
        "no such folder": [str(tmp_path / "absent")],
        "one method has nothing": [str(tmp_path), "compressor=visionzip"],
        "a pruner drops inside it": [str(tmp_path), "pruner=fastv"],
        "mmtok: text-aware, so give --question": [str(tmp_path), "compressor=mmtok,visionzip"],
        "budget=65tko": [str(tmp_path), "budget=65tko"],
    }
    for text, words in refused.items():
        assert cli.main(["overlap", *words]) == 2
        assert text in capsys.readouterr().err
