"""train.py with ``launcher=auto`` and ``dry_run``: what is printed, passed on, resumed, refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.config.kit import Run
from tests.config.kit import run as run_refusing  # noqa: F401  a fixture
from tests.train.commands import composed, run
from tests.train.kit import LAUNCH, dying_at
from tests.train.machines import GIB, gpus, needs, preset

import vzip.config.memory_plan
from vzip.config.build import launch_of
from vzip.config.launching import launching
from vzip.config.memory_plan import training_estimate
from vzip.config.training import checked
from vzip.errors import RunExistsError
from vzip.train import choosing, launch
from vzip.train.checkpoint import Begun
from vzip.train.choosing import Device, Place

LITERAL = "+exp=llava15_7b_64tok"


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Place], None]:
    """Puts train.py on a machine, where a 7B needs what it needs."""

    def put(place: Place) -> None:
        count = len(place.gpus)
        monkeypatch.setattr(choosing, "find_place", lambda device: place)
        monkeypatch.setattr(choosing, "several_strategies", lambda quantized: None)
        monkeypatch.setattr(vzip.config.memory_plan, "training_estimate", lambda config: needs(13.5))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return put


def test_the_plan_of_the_literal_command(
    at: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at(gpus(8, 79.2, "NVIDIA A800 80GB"))
    monkeypatch.chdir(tmp_path)
    assert run("train", [LITERAL, "dry_run=true"], monkeypatch) == 0
    shown = dict((line[:14].strip(), line[14:]) for line in capsys.readouterr().out.splitlines())
    assert shown["model"] == "llava-hf/llava-1.5-7b-hf, bfloat16"
    assert shown["trains"].startswith("20,979,712 of 7,063,427,072 parameters")
    assert shown["compressor"].endswith(": 64 visual tokens an image")
    assert shown["data"].startswith("llava_mix665k_tenth: about 66,530 conversations of 665,298")
    assert "missing: data/llava_v1_5_mix665k/llava_v1_5_mix665k.json" in shown["data"]
    assert "python -m vzip data verify llava_v1_5_mix665k --root data/llava_v1_5_mix665k" in shown["data"]
    assert shown["steps"] == "519 of 128 samples; 98 samples an epoch fill no step and are left out"
    assert shown["launcher"].startswith("auto: 8 x NVIDIA A800 80GB, zero2, batch 16 a device, gradient checkpointing:")
    assert shown["memory"].startswith("39.4 GiB a device")
    assert shown["run directory"] == "runs/train/projector/llava15_7b_64tok/visionzip-64tok/seed0"
    assert not list(tmp_path.iterdir())


def test_ones_own_data_is_opened_in_a_dry_run_and_no_index_is_left(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run("train", [*words, "dry_run=true", "train.num_validation_samples=1"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "8 conversations" in shown and "1 of 4 samples; 3 samples an epoch fill no step" in shown
    (tmp_path / "3.png").unlink()
    assert run("train", [*words, "dry_run=true"], monkeypatch) == 0
    assert "missing: data.json: 1 samples lack an image" in capsys.readouterr().out
    assert run("train", [*words, "dry_run=true", "launcher=zero2_8gpu", "launcher.batch_size=1"], monkeypatch) == 2
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path.name != "3.png"]


def test_what_fits_nowhere_is_said_before_anything_is_loaded(
    run_refusing: Run,  # noqa: F811
    at: Any,
    tmp_path: Path,
) -> None:
    at(Place((), Device("CPU", 8 * GIB), 4))
    code, error = run_refusing(LITERAL, name="train")
    assert code == 2 and error.startswith("DoesNotFitError: this training fits nowhere here") and "8.0 GiB" in error
    assert run_refusing(LITERAL, "dry_run=true", name="train") == (0, "")  # planned on a login node
    assert not list(tmp_path.iterdir())


def test_the_processes_take_what_was_chosen(at: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    at(gpus(4, 79.2))
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []
    monkeypatch.setattr(launch, "run_command", started.append)
    given = ["+exp=tiny_64tok", "launcher.num_workers=2", "launcher.batch_size=2"]
    assert run("train", given, monkeypatch) == 0
    (command,) = started
    before, _, words = " ".join(command).partition("train.py ")
    assert "vzip.train.torchrun" in before and "--nproc_per_node=4" in before
    assert words.startswith(" ".join(given))
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(choosing, "find_place", lambda device: pytest.fail("it was chosen twice"))
    taken = launching(checked(composed(words.split())))
    assert taken.is_told
    expected = dataclasses.replace(preset("zero2_8gpu"), num_processes=4, batch_size=2, num_workers=2)
    assert launch_of(taken.config) == dataclasses.replace(expected, gradient_checkpointing=False)


def test_a_run_goes_on_with_the_launcher_it_was_begun_with(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [*words, "train.save_every=1", "train.num_steps=3"]
    with dying_at(1, is_command=True):
        assert run("train", [*words, "launcher.batch_size=1", "launcher.num_workers=1"], monkeypatch) == 130
    (header,) = tmp_path.glob("runs/train/*/model/*/seed0/checkpoints/step-00000001/tuned.json")
    began = json.loads(header.read_text())["launcher"]
    assert (began["batch_size"], began["num_workers"], began["strategy"]) == (1, 1, "single")
    capfd.readouterr()
    with dying_at(2, is_command=True):
        assert run("train", words, monkeypatch) == 130
    shown = capfd.readouterr()
    assert "auto: single on 1 processes, batch 1 a device, as the run was begun" in shown.out
    assert "resuming at step 1\n" in shown.err
    # Another launcher that is named is taken, and what differs is said.
    assert run("train", [*words, "launcher=inline"], monkeypatch) == 0
    error = capfd.readouterr().err
    assert "resuming at step 2; launcher: batch_size=4 (was 1), num_workers=0 (was 1), which does" in error


def test_what_deepspeed_wrote_goes_on_as_it_was_written(at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    zero2 = dataclasses.replace(preset("zero2_8gpu"))
    begun = Begun(zero2, 8, Path("run/checkpoints/step-00000100"))
    begun.check(dataclasses.replace(zero2, batch_size=2, gradient_checkpointing=False), 8)
    for other, count in ((zero2, 4), (preset("zero3_8gpu"), 8), (preset("ddp"), 8), (LAUNCH, 1)):
        with pytest.raises(RunExistsError, match=r"written with launcher\.strategy=zero2 on 8 processes"):
            begun.check(other, count)
    Begun(LAUNCH, 1, Path("x")).check(preset("ddp"), 8)  # whole: any number of processes reads it
    with pytest.raises(RunExistsError, match=r"written with launcher\.strategy=single"):
        Begun(LAUNCH, 1, Path("x")).check(zero2, 8)

    monkeypatch.setattr("vzip.train.checkpoint.CheckpointStore.begun", lambda self: begun)
    config = checked(composed([LITERAL]))
    at(gpus(8, 79.2))
    assert launch_of(launching(config).config) == zero2
    at(gpus(4, 79.2))
    with pytest.raises(RunExistsError, match="on 8 processes, but here are 4 GPUs"):
        launching(config)
    assert launch_of(launching({**config, "overwrite": True}).config).num_processes == 4
    # What one process or several have written without it goes on elsewhere, still without.
    whole = Begun(preset("ddp"), 8, begun.checkpoint)
    monkeypatch.setattr("vzip.train.checkpoint.CheckpointStore.begun", lambda self: whole)
    assert launch_of(launching(config).config).strategy == "ddp"
    at(gpus(1, 23.6))
    assert launch_of(launching(config).config) == preset("single_24gb")


def test_the_real_estimate_grows_evenly_with_the_batch(words: list[str]) -> None:
    """Between two sizes ``launcher=auto`` draws a line."""
    needed = training_estimate(checked(composed([*words, "train.max_length=64", "train.samples_per_step=16"])))
    two, four, eight = (needed(dataclasses.replace(LAUNCH, batch_size=size), 1) for size in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.02)
