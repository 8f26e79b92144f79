"""train.py, eval.py and merge from the command line: one's own model and data, nothing registered."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.assembly import save_language_model, save_tower
from tests.train.commands import composed, run
from transformers import LlavaForConditionalGeneration

import vzip
from vzip.cli.merge import merge
from vzip.config.build import evaluation_plan
from vzip.config.options import config_dir
from vzip.config.training import checked, tuning_plan
from vzip.demo.dialogues import SceneDialogues, scene_of
from vzip.errors import ConfigError
from vzip.models.assemble import assemble
from vzip.train import launch


def test_train_then_evaluate_with_the_same_words(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("train", words, monkeypatch) == 0
    assert "training 2,112 of" in capfd.readouterr().err
    (final,) = tmp_path.glob("runs/train/*/model/visionzip-6+3/seed0/final")
    plan = evaluation_plan(composed([*words, "model.projector=trained", "model.device_map=null"], "eval"))
    assert Path(plan.model["projector"]).resolve() == final
    header = json.loads((final / "tuned.json").read_text())
    assert plan.evaluation["resolved_config"]["model"]["projector_sha256"] == header["sha256"]
    assert "projector-trained" in str(plan.evaluation["run_dir"])
    tuned = vzip.load_vlm(**plan.model, compressor=plan.compressor)
    base = vzip.load_vlm(**{**plan.model, "projector": None}, compressor=plan.compressor)
    pixels = tiny.pixels(1)
    assert not tuned.encode_images(pixels)[0].allclose(base.encode_images(pixels)[0])

    # The same command again: the run is finished, and stays as it is.
    assert run("train", words, monkeypatch) == 2
    assert "this run is finished" in capfd.readouterr().err


def test_a_model_of_ones_own_parts_from_assembling_to_a_stock_checkpoint(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_tower(tmp_path / "tower", "clip")
    save_language_model(tmp_path / "lm", tied=True)
    assemble(tmp_path / "tower", tmp_path / "lm", tmp_path / "model2")
    words = [word.replace(str(tmp_path / "model"), str(tmp_path / "model2")) for word in words]
    assert run("train", words, monkeypatch) == 0
    (final,) = tmp_path.glob("runs/train/*/model2/visionzip-6+3/seed0/final")
    merge(final, tmp_path / "merged")
    stock, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    before = vzip.load_vlm(tmp_path / "model2")
    for name, parameter in before.model.named_parameters():
        assert torch.equal(stock.get_parameter(name), parameter) is not name.startswith("model.multi_modal_projector")
    # Trained further: begins with the projector that is there.
    config = composed([*words, f"model.projector={final}"])
    further = tuning_plan(checked(config)).load_model("float32")
    for name, parameter in further.adapter.projector.named_parameters():
        assert torch.equal(parameter, stock.get_parameter(f"model.multi_modal_projector.{name}"))


def broken(change: Any) -> Any:
    """Rewrites the data: ``change`` gets the third record's conversation turns."""

    def apply(folder: Path) -> None:
        records = json.loads((folder / "data.json").read_text())
        change(records[3]["conversations"])
        (folder / "data.json").write_text(json.dumps(records))

    return apply


TWO = ["launcher=zero2_2cpu", "launcher.batch_size=2"]
# What is done to the data, further words, and what must be said; nothing of a model may be read by then.
WRONG: dict[str, tuple[Any, list[str], str]] = {
    "an image is missing": (lambda folder: (folder / "3.png").unlink(), [], "r3: no such file: "),
    "an image is empty": (lambda folder: (folder / "3.png").write_bytes(b""), [], "r3: 0 bytes: "),
    "no JSON": (lambda folder: (folder / "data.json").write_text("[{"), [], "not readable as JSON at byte"),
    "other JSON": (None, ["data.json=model/config.json"], "break LLaVA's format"),
    "no assistant turn": (broken(lambda turns: turns.pop()), [], "no 'gpt' turn follows a 'human' turn"),
    "two placeholders": (broken(lambda turns: turns[0].update(value="<image><image>?")), [], "2 <image>"),
    "an empty part": (None, ["data.fraction=1e-9"], "chose none of 8 samples"),
    "all held out": (None, ["train.num_validation_samples=8"], "0 training samples are fewer than one step"),
    "uneven batches": (
        None,
        ["launcher=inline", "train.samples_per_step=6"],
        "is not a multiple of launcher.batch_size=4",
    ),
    "said before processes start": (lambda folder: (folder / "3.png").unlink(), TWO, "r3: no such file: "),
    "more processes than cores": (
        None,
        ["launcher=ddp", "launcher.device=cpu", "launcher.num_processes=4096", "train.samples_per_step=65536"],
        "launcher.num_processes=4096: this machine has",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    case: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", lambda **_: pytest.fail("a model was loaded"), raising=False)
    monkeypatch.setattr(launch, "run_command", lambda command: pytest.fail("processes were started"))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    spoil, more, message = WRONG[case]
    if spoil is not None:
        spoil(tmp_path)
    assert run("train", [*words, *more], monkeypatch) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_several_processes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def note(command: list[str]) -> None:
        assert "HYDRA_FULL_ERROR" not in os.environ, "an error of a process would be a traceback"
        started.append(command)

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(launch, "run_command", note)
    assert run("train", ["-m", *words, *TWO, "seed=1,2"], monkeypatch) == 0
    assert [command[-1] for command in started] == ["seed=1", "seed=2"], "a sweep goes on after its first job"
    assert {"vzip.train.torchrun", "--nproc_per_node=2"} <= set(started[0])


@pytest.mark.slow
def test_an_interrupted_training_of_two_processes_is_one_line(words: list[str]) -> None:
    """As ctrl-C in a terminal, once there is a checkpoint."""
    command = [
        sys.executable,
        str(config_dir().parent / "train.py"),
        *words,
        *TWO,
        "train.num_epochs=500",
        "train.save_every=2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list(Path("runs").rglob("step-*")):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=120)[1]
    lines = [line for line in told.splitlines() if line.startswith("interrupted:")]
    assert process.returncode == 130 and len(lines) == 1 and "Traceback" not in told, told
    assert re.fullmatch(r"interrupted: step \d+ of 1,000 is kept in runs/.*\. The same command continues\.", lines[0])
    assert "Loading weights" not in told and "accelerator" not in told and "Warning" not in told


def test_trained_needs_a_training(words: list[str], tmp_path: Path) -> None:
    cfg = composed([*words, "model.projector=trained"], "eval")
    with pytest.raises(ConfigError, match=r"final is not there\. Run `python train\.py"):
        evaluation_plan(cfg)


def test_generated_dialogues() -> None:
    data = SceneDialogues(num_images=3, num_questions=4)
    assert len(data) == 3 == len(data.lengths) and data.has_images.all()
    sample = data[1]
    assert sample.id == f"scene-{scene_of(1).seed}" and len(sample.dialogues) == 4
    assert all(len(turns) == 2 and turns[0].text.startswith("<image>\n") for turns in sample.dialogues)
    again = data[1]
    assert again.dialogues == sample.dialogues
    assert again.images[0].tobytes() == sample.images[0].tobytes()  # type: ignore[union-attr]  # images
