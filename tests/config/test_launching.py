"""eval.py on several processes: what it starts, where each process's model goes, what a sweep refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tests.config.kit import ROOT, Run, script

import vzip.train.launch
from vzip.config.build import EvaluationPlan, evaluation_plan
from vzip.config.options import config_dir


def plan(*words: str) -> EvaluationPlan:
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        return evaluation_plan(compose("eval", list(words)))


def test_the_launcher_starts_the_processes(monkeypatch, tmp_path):
    started: list[list[str]] = []
    checked: list[list[str]] = []
    monkeypatch.setattr(vzip.train.launch, "run_command", started.append)
    monkeypatch.setattr(EvaluationPlan, "include_path", lambda self: "tasks")
    monkeypatch.setattr(EvaluationPlan, "check_tasks", lambda self, folder: checked.append(self.evaluation["tasks"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.chdir(tmp_path)
    for launcher in ("ddp", "zero2_8gpu"):  # a training's words do for its evaluation too
        monkeypatch.setattr(sys, "argv", ["eval.py", f"launcher={launcher}", "budget=32tok"])
        script("eval").main()
    for command, launcher in zip(started, ("ddp", "zero2_8gpu"), strict=True):
        before, _, words = " ".join(command).partition("eval.py ")
        assert "vzip.train.torchrun" in before and "--nproc_per_node=8" in before
        assert words == f"launcher={launcher} budget=32tok"
    assert len(checked) == 2 and not list(tmp_path.iterdir())


def test_each_process_takes_its_own_device_and_the_record_names_none(monkeypatch):
    words = ("model=llava15_7b", "eval=quick")
    assert plan(*words).model["device_map"] == "auto"
    assert plan(*words, "launcher.device=cpu").model["device_map"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    of_a_process = plan(*words)
    assert of_a_process.model["device_map"] == {"": 1}
    assert of_a_process.evaluation["resolved_config"]["model"]["device_map"] == "auto"


def test_settings_reach_the_evaluation():
    arguments: dict[str, Any] = plan("eval.num_workers=5", "eval.on_problem=skip", "eval.trackers=[wandb]").evaluation
    assert arguments["trackers"] == ("wandb",) and plan().evaluation["trackers"] == ()
    assert (arguments["num_workers"], arguments["on_problem"]) == (5, "skip")
    assert json.loads(json.dumps(arguments["resolved_config"]))["eval"]["num_workers"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.num_workers=-1"], "eval.num_workers=-1: must be a whole number, 0 or more"),
        (["eval.trackers=[tensorboard]"], "eval.trackers=['tensorboard']: must be a list of any of wandb, each once"),
        (["eval.on_problem=skp"], "eval.on_problem=skp: must be one of refuse, skip (did you mean 'skip'?)"),
        (["launcher.device=cuda"], "launcher.device=cuda: this machine has no CUDA device"),
        (["launcher.num_processes=4096"], "launcher.num_processes=4096: this machine has"),
        (["-m", "budget=64tok,32tok", "launcher.num_processes=2"], "a job of a sweep is one process"),
    ],
)
def test_refusals(run: Run, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, shown = run(*words)
    assert code != 0 and message in shown


@pytest.mark.slow
def test_two_processes_of_the_built_in_model_equal_one(tmp_path):
    """From the command line, on the benchmark."""
    words = ["eval.limit=12", "eval.batch_size=4", "launcher.device=cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    records = []
    for name, more in (("one", []), ("two", ["launcher=ddp", "launcher.num_processes=2"])):
        command = [sys.executable, str(ROOT / "eval.py"), *more, *words, f"paths.run_dir={tmp_path / name}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("vzip.train.torchrun --nproc_per_node=2" in done.stderr) == (name == "two")
        assert done.stdout.count("visual tokens an image, measured: 64 (48 images)") == 1
        records.append(json.loads((tmp_path / name / "run.json").read_text()))
    one, two = records
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for key in ("tasks", "visual_tokens", "batch_sizes", "data"):
        assert one[key] == two[key], key
    assert (tmp_path / "one" / "samples.jsonl").read_bytes() == (tmp_path / "two" / "samples.jsonl").read_bytes()
