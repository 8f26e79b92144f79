"""eval.py on a checkpoint and a task of one's own, from the command line to the record: nothing registered."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tests import mgm_layout, tiny, tiny_mini_gemini
from tests.config.kit import script
from tests.media.clips import write

pytest.importorskip("lmms_eval")
datasets = pytest.importorskip("datasets")


def test_ones_own_model_and_task(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    script("eval").main()
    run = tmp_path / "runs/mine/my-checkpoint/visionzip-6+2/seed0"
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["budget"] == {"name": "6+2", "num_dominant": 6, "num_contextual": 2, "scope": "crop"}
    assert (record["visual_tokens"]["measured_min"], record["visual_tokens"]["measured_max"]) == (8, 8)
    assert list(record["tasks"]) == ["mine"]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 3
    assert "exact_match" in capfd.readouterr().out

    # The same command again: refused, and the record stays as it is; an unknown task is refused before anything loads.
    before = (run / "run.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        script("eval").main()
    assert ended.value.code == 2 and "already holds a record" in capfd.readouterr().err
    assert (run / "run.json").read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*command, "eval.tasks=[mines]"])
    monkeypatch.setattr("vzip.models.model_cache.load_vlm", lambda **model: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        script("eval").main()
    assert ended.value.code == 2 and "(did you mean 'mine'?)" in capfd.readouterr().err
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["mine"]


def test_images_and_videos_of_video_llava(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint, tasks = tmp_path / "my-checkpoint", tmp_path / "my-tasks"
    shutil.rmtree(checkpoint)
    processor = tiny.video_processor()
    tiny.video_llava(vocab_size=len(processor.tokenizer), video_token=5).save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    clip = write(tasks / "clip.mp4")
    (tasks / "utils.py").write_text(
        "def visual(doc):\n"
        f"    return [doc['image'].convert('RGB')] if doc['image'].getpixel((0, 0))[0] else [{str(clip)!r}]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*command, "model.num_frames=4"])
    script("eval").main()
    (run,) = (tmp_path / "runs/mine").glob("*/visionzip-6+2/seed0")
    record = json.loads((run / "run.json").read_text())
    assert (record["visual_tokens"]["measured_min"], record["visual_tokens"]["measured_max"]) == (8, 32)
    assert record["config"]["model"]["num_frames"] == 4
    counts = [json.loads(line)["num_visual_tokens"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sorted(counts) == [[8], [8], [32]]


def test_a_published_mini_gemini_is_evaluated_and_asked(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from vzip.cli import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    model = tiny_mini_gemini.mini_gemini(vocab_size=mgm_layout.VOCABULARY)
    checkpoint = mgm_layout.save_all(model, tmp_path / "root")
    words = [f"model.name_or_path={checkpoint}" if "name_or_path" in word else word for word in command]
    monkeypatch.setattr(sys, "argv", words)
    script("eval").main()
    record = json.loads((tmp_path / "runs/mine/tiny/visionzip-6+2/seed0/run.json").read_text())
    assert (record["visual_tokens"]["measured_min"], record["visual_tokens"]["measured_max"]) == (8, 8)
    assert record["tasks"]["mine"]["num_samples"] == 3
    capfd.readouterr()

    Image.new("RGB", (60, 40), "green").save(tmp_path / "green.png")
    settings = [word for word in words if word.startswith(("model.", "budget."))]
    assert main(["ask", "green.png", "is it red?", "--model", "llava_local", "--max-new-tokens", "3", *settings]) == 0
    assert "(8 visual tokens, 64 without compression)" in capfd.readouterr().out

    large = [word.replace("num_dominant=6", "num_dominant=64") for word in words]
    monkeypatch.setattr(sys, "argv", large)
    with pytest.raises(SystemExit) as ended:
        script("eval").main()
    assert ended.value.code == 2 and "65 to choose from" in capfd.readouterr().err
