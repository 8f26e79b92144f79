"""`python -m vzip ask`: any image, an answer without marks, and a drawing of what was kept."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from vzip import cli, installed
from vzip.analysis import kept
from vzip.analysis.overlay import draw_overlay
from vzip.config.options import config_dir
from vzip.errors import ImageError
from vzip.media.images import load_image
from vzip.media.video import is_image

SCENE = config_dir().parent / "docs" / "scene.png"
QUESTION = "What word is written on the sign?"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_an_answer_without_marks_and_what_was_kept(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings: list[Any] = []
    monkeypatch.setattr(kept, "draw_overlay", lambda *given: drawings.append(given) or draw_overlay(*given))
    with Image.open(SCENE) as image:
        image.save(tmp_path / f"scene.{ending}", **({"lossless": True} if ending == "webp" else {}))
    words = ["ask", str(tmp_path / f"scene.{ending}"), QUESTION, "budget=64tok", "--max-new-tokens", "6"]
    assert cli.main([*words, "--overlay", str(tmp_path / "out.png")]) == 0
    told = capsys.readouterr().out
    assert told == f"air\n(64 visual tokens, 576 without compression)\nwrote {tmp_path / 'out.png'}\n"
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 800 and np.asarray(drawn.convert("L")).min() < 60
    ((sheets, words),) = drawings
    assert (words.title, words.question, words.answer) == ("tiny, VisionZip", QUESTION, "air")
    assert words.tokens == "64 of 576 visual tokens: 54 dominant + 10 contextual"
    assert len(sheets) == 1 and len(np.unique(sheets[0].crops[0].group)) == 11


def test_an_address_keeps_its_slashes_and_nothing_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "https://example.org/a.png", "what?"]) == 2
    assert "https://example.org/a.png: images and videos are read from files; download it first" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("eval.gen_kwargs.max_new_tokens=5", "an answer's length is --max-new-tokens N"),
        ("eval.gen_kwargs.num_beams=2", "answers are greedy"),
        ("eval.limit=3", "benchmarks are asked by eval.py"),
        ("eval=quick", "benchmarks are asked by eval.py"),
        ("launcher.device=cpu", "the device is model.device_map"),
        ("++dry_run=true", "no run is begun"),
    ],
)
@pytest.mark.parametrize("command", [["ask", str(SCENE), QUESTION], ["chat"], ["demo", "serve", "--port", "7861"]])
def test_settings_of_an_evaluation_are_not_silently_left_out(
    command: list[str], word: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vzip.load_vlm", lambda *_, **__: pytest.fail("a model was loaded"))
    assert cli.main([*command, word]) == 2
    error = capsys.readouterr().err
    assert f"{word}: has no effect here" in error and why in error


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("out.txt", "must end in one of .png"),
        ("no/out.png", "no folder"),
        ("/proc/out.png", "/proc: cannot be written"),
    ],
)
def test_an_overlay_that_cannot_be_written(name: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", str(SCENE), QUESTION, "--overlay", name]) == 2
    assert why in capsys.readouterr().err


def test_the_image_of_a_phone_names_what_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(installed, "_requirements", lambda: {"pillow-heif": {"heic": "pillow-heif>=0.20"}})
    assert cli.main(["ask", str(tmp_path / "a.jpg"), QUESTION]) == 2
    told = capsys.readouterr().err
    assert "a HEIC image needs the package pillow-heif" in told and ".[heic]" in told and "save it as JPEG" in told


def test_the_image_of_a_phone_is_read_by_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.heic").write_bytes(HEIC)
    heif, registered = ModuleType("pillow_heif"), []
    heif.__dict__["register_heif_opener"] = lambda: registered.append("HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    with pytest.raises(ImageError, match="not an image"):  # this one is a head only
        load_image(tmp_path / "a.heic")
    assert registered == ["HEIF"]


def test_an_image_of_a_phone_is_read(tmp_path):
    """Its colours within what the format loses."""
    pillow_heif.register_heif_opener()
    path = tmp_path / "photo.jpg"  # found by its content, whatever its name
    Image.new("RGB", (64, 48), (200, 30, 40)).save(path, format="HEIF")
    loaded = load_image(path)
    assert loaded.size == (64, 48) and is_image(path)
    assert all(abs(a - b) < 8 for a, b in zip(loaded.getpixel((30, 20)), (200, 30, 40), strict=True))
