"""`python -m vzip fidelity`: on the built-in model, without labels; what is wrong is said before it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vzip
from vzip import cli
from vzip.config.options import config_dir
from vzip.models.towers import cache
from vzip.models.towers.cache import TowerCache
from vzip.results.stats import mean_interval

SCENE = config_dir().parent / "docs" / "scene.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them in a folder of its own, a damaged one and a file that is none."""
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    shutil.copy(SCENE, images / "a.png")
    with Image.open(SCENE) as scene:
        scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / "more" / "b.jpg")
    (images / "cut.png").write_bytes(SCENE.read_bytes()[:2000])
    (images / "notes.txt").write_text("no image")
    return images


def test_vanilla_is_itself_and_fewer_tokens_are_farther(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("What word is written on the sign?\n\nIs there a star in the image?\n")
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "6", "--out", str(tmp_path / "out")]
    caches: list[TowerCache] = []
    monkeypatch.setattr(cache, "TowerCache", lambda gib: caches.append(TowerCache(gib)) or caches[-1])
    assert cli.main(["fidelity", str(folder), "compressor=random", "budget=full,192tok,17tok", *words]) == 0
    assert [each.num_misses for each in caches] == [1, 1], "the tower runs once an image, for all methods and prompts"
    told = capsys.readouterr()
    assert "cut.png: cut off or damaged" in told.err and "left out: 1" in told.out
    record = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert (record["num_images"], record["num_damaged"], len(record["prompts"])) == (2, 1, 2)
    assert [Path(path).name for path in record["images"]] == ["a.png", "b.jpg"]
    assert Path(record["damaged"][0]["image"]).name == "cut.png" and "torch" in record["versions"]
    vanilla, many, few = record["methods"]
    assert [row["num_visual_tokens"] for row in record["methods"]] == [576, 192, 17]
    assert vanilla["method"] == "none" and vanilla["kl"]["mean"] < 1e-6
    assert vanilla["agreement"]["mean"] == vanilla["identical"]["mean"] == 1.0
    assert few["kl"]["mean"] > many["kl"]["mean"] > vanilla["kl"]["mean"]
    for row in record["methods"]:
        for name in ("kl", "agreement", "identical"):
            values = row["per_image"][name]
            assert row[name]["mean"] == pytest.approx(np.mean(values)) and len(values) == 2
            assert [row[name]["low"], row[name]["high"]] == list(mean_interval(np.array(values)))

    monkeypatch.setattr(vzip, "load_vlm", None)
    assert cli.main(["fidelity", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "already holds a fidelity.json" in capsys.readouterr().err


def test_all_that_is_wrong_is_said_before_loading(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", None)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "marked.txt").write_text("What is <image>?\n")
    words = ["--prompts", str(tmp_path / "empty.txt"), "--max-new-tokens", "0"]
    assert cli.main(["fidelity", str(tmp_path / "absent"), *words, "budget=64tok,65tko", "compresor=x"]) == 2
    told = capsys.readouterr().err
    for text in ("absent: no such folder", "holds no prompt", "--max-new-tokens=0", "budget=65tko", "compresor"):
        assert text in told
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    refused = {
        "holds no image": [str(tmp_path / "none")],
        "none of its 1 images can be read": [str(tmp_path / "bad")],
        "a file, no folder": [str(SCENE)],
        "placeholder is put before": [str(folder), "--prompts", str(tmp_path / "marked.txt")],
        "no such file": [str(folder), "--prompts", str(tmp_path / "absent.txt")],
        "the vision tower": [str(folder), "budget=64tok,900tok", "budget.num_dominant=900"],
        "pruner=fastv": [str(folder), "pruner=none,fastv"],
    }
    for text, given in refused.items():
        assert cli.main(["fidelity", *given]) == 2
        assert text in capsys.readouterr().err
