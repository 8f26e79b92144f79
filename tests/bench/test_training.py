"""``bench --train`` and ``--memory``: the real step, in turn, without what is not installed everywhere."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tests.bench.conftest import bench_model

import vzip
from vzip.bench import training
from vzip.bench.memory.measure import measure_inference, measure_training
from vzip.bench.memory.model_shape import ModelShape
from vzip.bench.settings import MEMORY, TRAIN, parse
from vzip.bench.training import NUM_SAMPLES, measure_training_steps
from vzip.cli import bench as cli
from vzip.config.options import config_dir, option_values
from vzip.errors import ConfigError, RunExistsError
from vzip.train.stepping import Stepper

WORDS = ["weights=random", "budget=12+4", "device=cpu", "batch_size=2", "prompt_tokens=20"]


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_intermixed_args(list(words)))


def test_training_is_measured_in_turn_by_the_real_step(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[tuple[int, int]] = []
    real = Stepper.step

    def step(self: Stepper, number: int, num_steps: int, batches: object) -> dict:
        metrics = real(self, number, num_steps, batches)  # type: ignore[arg-type]
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        assert trained and all("projector" in name for name in trained)
        assert self.model.vlm.model.is_gradient_checkpointing
        taken.append((number, metrics["num_visual_tokens"]))
        return metrics

    monkeypatch.setattr(Stepper, "step", step)
    words = [f"model={checkpoint}", *WORDS, "repeats=2", "warmup=1", f"out={tmp_path}"]
    assert run("--train", *words) == 0
    # Warm-up, two rounds and one for the memory, alternating: 2 images of 64 tokens, then of 16.
    assert taken == [(n, 2 * (64, 16)[n % 2]) for n in range(8)]
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["kind"] == "train" and result["resolved"]["trained"] == "projector"
    for name, num_visual in (("vanilla", 64), ("vzip", 16)):
        method = result["methods"][name]
        assert (method["num_visual_tokens"], method["num_tokens"]) == (num_visual, num_visual + 20)
        step_ms = method["stages"]["step"]
        assert len(step_ms["samples_ms"]) == 2 and method["stages"]["forward"]["median_ms"] < step_ms["median_ms"]
        assert method["samples_per_s"] == pytest.approx(2 / (step_ms["median_ms"] / 1000))
        assert method["projected_hours"] == pytest.approx(NUM_SAMPLES * step_ms["median_ms"] / 1000 / 2 / 3600)
        assert method["measured_bytes"] > sum(method["estimated_bytes"].values()) > 0 and method["loss"] > 0
    about = result["environment"]
    assert about["command"].startswith("python -m vzip") and about["versions"]["torch"] and about["hardware"]["cpu"]
    assert len(about["code"]["source_sha256"]) == 64
    assert "samples a second" in capsys.readouterr().out
    with pytest.raises(RunExistsError, match=r"train\.json"):
        run("--train", *words)


@pytest.mark.whole
def test_memory_is_measured_beside_its_estimate(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = [f"model={checkpoint}", *WORDS[1:], "methods=vanilla,vzip", "num_new_tokens=3", f"out={tmp_path}"]
    assert run("--memory", *words) == 0
    methods = json.loads((tmp_path / "memory.json").read_text())["methods"]
    for work in ("training", "inference"):
        for method in methods.values():
            peak = method[work]
            assert sum(peak["estimated_bytes"].values()) == pytest.approx(peak["measured_bytes"], rel=0.15)
        assert methods["vzip"][work]["measured_bytes"] < methods["vanilla"][work]["measured_bytes"]
    assert "vzip, inference" in capsys.readouterr().out


def test_a_measured_model_is_gone_afterwards() -> None:
    """Or the next one's peak on a GPU, where the allocator counts everything, would hold it too."""
    shape = ModelShape(bench_model().config, vzip.VisionZip(vzip.TokenBudget(12, 4)))
    settings = parse(WORDS[1:], MEMORY)
    load, (train, launch) = training.load_of(settings, shape, 2)[0], training.train_settings(settings)
    for work in (lambda vlm: measure_inference(vlm, load), lambda vlm: measure_training(vlm, train, launch, load)):
        vlm = shape.with_random_weights(torch.device("cpu"), torch.float32)
        alive = weakref.ref(vlm.model)
        work(vlm)
        del vlm
        gc.collect()
        assert alive() is None


def test_the_step_is_that_of_train_projector() -> None:
    projector = option_values(config_dir(), "train", "projector")
    expected = {name: value for name, value in projector.items() if name not in ("name", "kind")}
    expected |= {"parts": ("projector",), "trackers": (), "samples_per_step": 2, "precision": "float32"}
    train, launch = training.train_settings(parse(WORDS, TRAIN))
    assert dataclasses.asdict(train) == expected and type(train.learning_rate) is float
    assert (launch.batch_size, launch.device, launch.gradient_checkpointing) == (2, "cpu", True)


@pytest.mark.parametrize(
    ("mode", "word", "message"),
    [
        (TRAIN, "methods=vzip,eager_maps", "methods=eager_maps: must be one of vanilla, vzip with --train"),
        (TRAIN, "num_new_tokens=3", "num_new_tokens=3: has no meaning with --train"),
        (TRAIN, "dtype=float16", "dtype=float16: must be one of auto, float32, bfloat16 with --train, which trains"),
        (TRAIN, "pruner.K=3", "pruner.K=3: has no meaning with --train"),
        (MEMORY, "device=cuda:1", "must be auto, cpu or cuda with --memory, since a training takes the first device"),
        (MEMORY, "repeats=3", "repeats=3: has no meaning with --memory"),
    ],
)
def test_words_of_another_mode(mode: object, word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([word], mode)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=clip_l_336"], "a vision tower alone"),
        (["model=llava15_7b", "prompt_tokens=4000"], "576 visual, 4000 text .* the language model has 4096 positions"),
        pytest.param(
            ["model=llava15_7b", "batch_size=1", "prompt_tokens=9"],
            "training model=llava15_7b needs about",
            marks=pytest.mark.whole,
        ),
        (["model=llava15_7b", "budget=600+10"], "577"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is_built(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vzip.bench.device_memory.available_bytes", lambda _device: 2**30)
    monkeypatch.setattr(training.workload, "build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ConfigError, match=message):
        measure_training_steps(parse([*words, "device=cpu"], TRAIN))


@pytest.mark.whole
@pytest.mark.parametrize("flag", ["--train", "--memory"])
def test_needs_torch_transformers_and_accelerate_alone(flag: str, checkpoint: Path, tmp_path: Path) -> None:
    program = """
import sys
absent = ("hydra", "omegaconf", "datasets", "lmms_eval", "wandb", "deepspeed", "peft", "matplotlib", "tenacity", "av")
for name in absent:
    sys.modules[name] = None
from vzip import cli
sys.exit(cli.main(["bench", *sys.argv[1:]]))
"""
    few = ["repeats=1", "warmup=0"] if flag == "--train" else ["num_new_tokens=2"]
    words = [flag, f"model={checkpoint}", *WORDS[flag == "--memory" :], *few, f"out={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    method = json.loads((tmp_path / f"{flag[2:]}.json").read_text())["methods"]["vzip"]
    assert (method if flag == "--train" else method["training"])["num_visual_tokens"] == 16
