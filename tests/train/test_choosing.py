"""``launcher=auto``: what is taken on which machine; no GPU is needed to know."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from tests.train.kit import SETTINGS
from tests.train.machines import CPU, GIB, gpus, needs, option, preset

from vzip.errors import ConfigError
from vzip.train import choosing
from vzip.train.choosing import Device, DoesNotFitError, Place, choose_launch, find_place, several_strategies
from vzip.train.settings import TrainSettings

LLAVA = dataclasses.replace(SETTINGS, samples_per_step=128, max_length=2048, precision="bfloat16")


def choose(place: Place, estimate: Any, train: TrainSettings = LLAVA, shared: Any = None, **asked: Any) -> Any:
    return choose_launch({**option("auto"), **asked}, place, train, estimate, shared)


def test_eight_80_gb_gpus_are_the_preset() -> None:
    estimate = needs(13.5)
    choice = choose(gpus(8, 79.2, "NVIDIA A800 80GB"), estimate)
    assert choice.launch == preset("zero2_8gpu")
    assert choice.reason == (
        "8 x NVIDIA A800 80GB, zero2, batch 16 a device, gradient checkpointing: estimated 39.4 of 79.2 GiB"
    )
    assert len(estimate.asked) == 2, "an estimate takes seconds"


def test_zero3_where_zero2_does_not_fit() -> None:
    choice = choose(gpus(8, 79.2), needs(80.0, trained_gib=100.0))
    assert choice.launch == preset("zero3_8gpu")


def test_one_24_gb_gpu_is_the_preset() -> None:
    for gib in (23.6, 24.0):
        assert choose(gpus(1, gib), needs(13.5)).launch == preset("single_24gb")


def test_gradient_checkpointing_only_where_the_batch_needs_it() -> None:
    assert choose(gpus(1, 79.2), needs(13.5)).launch.gradient_checkpointing
    choice = choose(gpus(1, 200), needs(13.5))
    assert (choice.launch.batch_size, choice.launch.gradient_checkpointing) == (16, False)
    assert "no gradient checkpointing: estimated 158.0 of 200.0 GiB" in choice.reason


@pytest.mark.parametrize(
    ("place", "taken"),
    [
        (gpus(1, 79.2), (1, "single", 16)),
        (gpus(4, 39.4), (4, "zero2", 8)),
        (gpus(3, 24), (2, "zero2", 2)),  # 128 samples do not divide by 3
        (gpus(16, 79.2), (16, "zero2", 8)),
        (dataclasses.replace(gpus(8, 79.2), num_machines=2, by_slurm=True), (8, "zero2", 8)),
        (dataclasses.replace(gpus(8, 79.2), num_started=4), (4, "zero2", 16)),  # torchrun has decided
    ],
)
def test_other_machines(place: Place, taken: tuple[int, str, int]) -> None:
    launch = choose(place, needs(13.5)).launch
    assert (launch.num_processes, launch.strategy, launch.batch_size) == taken
    assert launch.num_machines == (None if place.by_slurm else 1) and launch.device == "cuda"
    in_all = launch.num_processes * place.num_machines
    assert launch.accumulation(128, in_all) * launch.batch_size * in_all == 128


def test_what_is_left_unused_is_said() -> None:
    assert choose(gpus(3, 24), needs(13.5)).reason.endswith("(3 GPUs are visible; 2 share 128 samples a step evenly)")


def test_the_cpu_is_inline() -> None:
    expected = dataclasses.replace(preset("inline"), device="cpu")
    for estimate in (None, lambda launch, num_processes: 2 * GIB):
        assert choose(Place((), CPU, 2), estimate, SETTINGS).launch == expected


def test_what_fits_nowhere_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(DoesNotFitError) as error:
        choose(gpus(2, 23.6), needs(60.0))
    for part in (
        "estimated 31.6 GiB",
        "2 x GPU with 23.6 GiB each",
        "zero3",
        "model.quantization=4bit",
        "2048",
        "GPUs",
    ):
        assert part in str(error.value)
    with pytest.raises(DoesNotFitError, match=r"an estimated 15\.1 GiB .*1 x CPU .* a machine with a GPU"):
        choose(Place((), CPU, 2), needs(13.5))


def test_what_the_user_sets_stays() -> None:
    launch = choose(gpus(8, 79.2), needs(13.5), batch_size=2, num_workers=1, strategy="ddp").launch
    assert (launch.num_processes, launch.strategy, launch.batch_size, launch.num_workers) == (8, "ddp", 2, 1)
    assert not launch.gradient_checkpointing, "a batch of two needs none"
    assert choose(gpus(8, 79.2), needs(13.5), num_processes=2).launch.num_processes == 2
    with pytest.raises(ConfigError, match=r"samples_per_step=128 is not a multiple of launcher\.batch_size=1 x 3"):
        choose(gpus(8, 79.2), needs(13.5), num_processes=3)


def test_without_deepspeed_or_with_quantized_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    assert several_strategies(quantized=False) is None and several_strategies(quantized=True) == ("ddp",)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert several_strategies(quantized=False) == ("ddp",)
    assert choose(gpus(4, 79.2), needs(13.5), shared=("ddp",)).launch.strategy == "ddp"
    assert choose(gpus(1, 79.2), needs(13.5), shared=("ddp",)).launch.strategy == "single"


def test_looking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choosing, "visible_gpus", lambda here: asked.append(here) or gpus(2, 80).gpus)
    place = find_place("auto", {})
    assert len(place.gpus) == 2 and place.num_machines == 1 and place.cpu.num_bytes > GIB and not place.remark
    assert find_place("cpu", {}).gpus == ()
    started = find_place("auto", {"RANK": "9", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"})
    assert (started.num_started, started.num_machines, started.by_slurm) == (8, 2, False)
    assert asked == [False, True]
    step = {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "4"}
    assert (find_place("auto", step).num_machines, find_place("auto", step).by_slurm) == (4, True)
    alone = find_place("auto", {"SLURM_NNODES": "4"})
    assert alone.num_machines == 1 and "SLURM gave 4 machines, this is one" in alone.remark
    with pytest.raises(ConfigError, match="srun started 32 tasks on 4 machines"):
        find_place("auto", {**step, "SLURM_STEP_NUM_TASKS": "32"})


def test_gpus_are_asked_in_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The process that starts the others must not hold memory of their GPUs."""
    fake = "import torch, types; torch.cuda.device_count = lambda: 2;"
    fake += "torch.cuda.get_device_properties = lambda i: types.SimpleNamespace(name=f'MIG {i}', total_memory=5 + i)"
    (tmp_path / "sitecustomize.py").write_text(fake)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert choosing.visible_gpus(in_process=False) == (Device("MIG 0", 5), Device("MIG 1", 6))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="do not tell their memory"):
        choosing.visible_gpus(in_process=False)
