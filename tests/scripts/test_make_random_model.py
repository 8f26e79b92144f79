"""Random models of every family: written by the script, evaluated, asked about an image and a video."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from scripts import make_random_model as random_model
from tests.config.kit import script
from tests.media.clips import write

from vzip import cli
from vzip.errors import ConfigError, RunExistsError

# Crops of a scene (336 x 336 pixels); crops of an image of 672 x 672, and its visual tokens without compression.
# LLaVA-NeXT: base crop and two or four tiles; a newline token for each of 48 rows.
PUBLISHED = {
    "llava": (1, 1, 576),
    "llava_next": (3, 5, 5 * 576 + 48),
    "llava_onevision": (2, 5, 5 * 729 + 54),  # a scene fits one tile
    "video_llava": (1, 1, 256),
    "video_llava_published": (1, 1, 256),
    "mini_gemini": (1, 1, 576),
    "qwen2_5_vl": (1, 1, 576),  # the image below: 672 pixels are 24 merge units
    "qwen3_vl": (1, 1, 441),  # of 32 pixels: 21
    "internvl": (1, 5, 5 * 256),  # four tiles of 448 pixels and a thumbnail
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("random")
    for family in random_model.FAMILIES:
        random_model.save(family, root / family)
    return {family: root / family for family in random_model.FAMILIES}


@pytest.mark.parametrize("family", random_model.FAMILIES)
def test_a_family_is_evaluated_and_asked(
    checkpoints: dict[str, Path],
    family: str,
    small_benchmark: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lmms_eval")
    scene_crops, num_crops, vanilla = PUBLISHED[family]
    model = [f"model.name_or_path={checkpoints[family]}", "model.device_map=null", "budget=17tok"]
    model += ["model.preprocess=hf"] if family.startswith(("qwen", "internvl")) else []
    places = [f"eval.include_path={small_benchmark}", f"paths.run_dir={tmp_path / 'run'}"]
    limits = ["eval.tasks=[scenes_existence]", "eval.limit=2", "eval.gen_kwargs.max_new_tokens=3"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "model=llava_local", *model, *places, *limits])
    script("eval").main()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    tokens = record["visual_tokens"]
    assert (tokens["measured_min"], tokens["measured_max"]) == (17 * scene_crops, 17 * scene_crops)
    assert record["tasks"]["scenes_existence"]["num_samples"] == 2

    Image.new("RGB", (672, 672), "green").save(tmp_path / "green.png")
    ask = ["is it red?", "--model", "llava_local", "--max-new-tokens", "2", *model]
    capfd.readouterr()
    assert cli.main(["ask", str(tmp_path / "green.png"), *ask]) == 0
    told = f"({17 * num_crops} visual tokens, {vanilla} without compression)"
    assert told in capfd.readouterr().out
    clip = write(tmp_path / "clip.mp4")
    if family == "llava_onevision":
        assert cli.main(["ask", str(clip), *ask]) == 0
        assert f"({8 * 17 + 1} visual tokens, {8 * 196 + 1} without compression)" in capfd.readouterr().out
    elif family.startswith("video_llava"):
        assert cli.main(["ask", str(clip), *ask]) == 0
        assert f"({8 * 17} visual tokens, {8 * 257} without compression)" in capfd.readouterr().out
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"is it red?\n/video {clip}\nand now?\n"))
        assert cli.main(["chat", "--video", str(clip), *ask[1:]]) == 0
        out = capfd.readouterr().out
        assert out.count(f"{clip}: {8 * 17} visual tokens, {8 * 257} without compression") == 2
        assert f"({8 * 17} visual tokens in a dialogue" in out and f"({16 * 17} visual tokens in a dialogue" in out
    elif family.startswith("qwen"):
        assert cli.main(["ask", str(clip), *ask]) == 0
        assert " visual tokens, " in capfd.readouterr().out
    else:
        assert cli.main(["ask", str(clip), *ask]) == cli.USER_ERROR
        why = "files are not served yet" if family == "internvl" else "has no video tower"
        assert why in capfd.readouterr().err


def test_the_script_writes_what_the_function_builds(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = random_model.main
    monkeypatch.setattr(sys, "argv", ["make_random_model.py", "llava", str(tmp_path / "new")])
    assert main() == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (checkpoints["llava"] / name).read_bytes()
    assert main() == cli.USER_ERROR and "RunExistsError" in capsys.readouterr().err


def test_bad_words_write_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"family=llava_nxt: must be one of .*did you mean 'llava_next'"):
        random_model.save("llava_nxt", tmp_path / "new")
    with pytest.raises(RunExistsError, match="already and not empty"):
        random_model.save("llava", checkpoints["llava_next"])
    assert not (tmp_path / "new").exists()
