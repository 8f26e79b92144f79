"""Sweeps of eval.py: one model, one pass of the vision tower, a summary, and no job lost to another's failure."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests.config.kit import command, script

import vzip
import vzip.evaluation.run
from vzip.config.build import evaluation_plan, resolved
from vzip.config.full_budget import full_is_vanilla
from vzip.config.options import config_dir
from vzip.config.overrides import arrange, check_overrides
from vzip.config.same_run import same_run
from vzip.errors import ConfigError, RunExistsError
from vzip.json_files import to_json
from vzip.models import model_cache as reuse
from vzip.sweep.sweep import SweepCallback, distinct_words, pin_gpu

__all__ = ["command"]  # a fixture
Sweep = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sweep(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Sweep:
    """Runs `eval.py -m` on a tiny random model and three questions; returns exit code, output and messages."""
    pytest.importorskip("lmms_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    usual = [word for word in command if not word.startswith("budget.")]

    def run(*words: str, many: bool = True) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [*usual, *(["-m"] if many else []), *words])
        code = 0
        try:
            script("eval").main()
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return run


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {str(path.parent.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("run.json")}


def test_a_sweep_loads_once_encodes_once_and_sums_up(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads: list[str] = []
    load = reuse.load_vlm
    monkeypatch.setattr(reuse, "load_vlm", lambda name_or_path, **rest: loads.append("") or load(name_or_path, **rest))
    code, out, err = sweep("budget=full,32tok,17tok", "compressor=visionzip,random")
    assert code == 0, err
    assert len(loads) == 1
    found = records(tmp_path / "runs/mine/my-checkpoint")
    assert sorted(found) == [
        f"{name}/seed0" for name in ("none-full", "random-17tok", "random-32tok", "visionzip-17tok", "visionzip-32tok")
    ]
    for name, record in found.items():
        vanilla = name == "none-full/seed0"
        assert record["tower_cache"] == {"num_hits": 0 if vanilla else 3, "num_misses": 3 if vanilla else 0}
    assert "none-full/seed0 holds this very run: taken from its record" in err  # full with the other compressor

    (folder,) = (tmp_path / "runs/sweeps").iterdir()
    assert "5 jobs" in out and f"written to {folder}/: summary.md, summary.csv" in out
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [row["words"] for row in rows] == [
        "budget=full",
        *(f"budget={budget} compressor={name}" for budget in ("32tok", "17tok") for name in ("visionzip", "random")),
    ]
    assert [row["tokens_max"] for row in rows] == ["64", "32", "32", "17", "17"]
    for row in rows:
        score = json.loads(Path(row["run"]).read_text())["tasks"]["mine"]["metrics"]["exact_match"]["value"]
        assert float(row["score"]) == score and row["error"] == ""
    assert "| job | words |" in (folder / "summary.md").read_text()

    # A single run, without anything kept, gives the same answers.
    code, _, err = sweep("budget=32tok", f"paths.runs_dir={tmp_path / 'alone'}", many=False)
    assert code == 0, err
    samples = "mine/my-checkpoint/visionzip-32tok/seed0/samples.jsonl"
    assert (tmp_path / "alone" / samples).read_bytes() == (tmp_path / "runs" / samples).read_bytes()
    assert records(tmp_path / "alone/mine/my-checkpoint")["visionzip-32tok/seed0"]["tower_cache"] is None


def test_a_failed_job_loses_no_other_and_a_rerun_does_the_rest(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluate = vzip.evaluation.run.evaluate

    def fails_on_random(vlm: vzip.CompressedVlm, **rest: Any) -> dict[str, Any]:
        if isinstance(vlm.compressor, vzip.RandomTokens):
            raise ConfigError("the disk of job 0 is full")
        return evaluate(vlm, **rest)

    words = ("budget=17tok", "compressor=random,visionzip")
    with monkeypatch.context() as patch:
        patch.setattr(vzip.evaluation.run, "evaluate", fails_on_random)
        code, out, err = sweep(*words)
    assert code == 2 and "Traceback" not in err
    assert "1 of 2 jobs failed:\n  job 0 (compressor=random): ConfigError: the disk of job 0 is full" in err
    assert list(records(tmp_path / "runs/mine/my-checkpoint")) == ["visionzip-17tok/seed0"]
    assert "failed" in out

    assert "begun before" not in err
    left = tmp_path / "runs/mine/my-checkpoint/random-17tok/seed0/answers.partial.jsonl"
    left.parent.mkdir(parents=True, exist_ok=True)
    answer = {"key": ["mine", 0, 0], "digest": "", "prompt": "", "answer": "", "num_visual_tokens": []}
    content = to_json({"answers": [answer], "sizes": [1]})
    left.write_bytes(b'{"settings": {}}\n{"crc32": %d, "batch": %b}\n' % (zlib.crc32(content), content))
    monkeypatch.setattr(reuse, "KEEPER", reuse.ModelKeeper())
    code, _, err = sweep(*words)
    assert code == 0, err
    assert "begun before: 1 of 2 runs are finished and kept; 1 answers of 1 more are there" in err
    assert len(records(tmp_path / "runs/mine/my-checkpoint")) == 2
    assert "visionzip-17tok/seed0 holds this very run" in err and "random-17tok/seed0 holds" not in err


def test_a_job_that_does_not_end_is_in_the_summary(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate = vzip.evaluation.run.evaluate

    def stops_on_random(vlm: vzip.CompressedVlm, **rest: Any) -> dict[str, Any]:
        if isinstance(vlm.compressor, vzip.RandomTokens):
            raise KeyboardInterrupt
        return evaluate(vlm, **rest)

    monkeypatch.setattr(vzip.evaluation.run, "evaluate", stops_on_random)
    code, _, err = sweep("budget=17tok", "compressor=visionzip,random")
    assert code == 130 and "Traceback" not in err
    (directory,) = (path.parent / "random-17tok/seed0" for path in (tmp_path / "runs").rglob("visionzip-17tok"))
    kept = f"1 jobs of the sweep are finished and kept; of the one under way 0 answers are kept in {directory}"
    assert err.splitlines()[-1] == f"interrupted: {kept}. The same command continues."
    (folder,) = (tmp_path / "runs/sweeps").iterdir()
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [(row["words"], bool(row["error"])) for row in rows] == [
        ("compressor=visionzip", False),
        ("compressor=random", True),
    ]


@pytest.fixture
def hydra_folder() -> Iterator[None]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield


def test_full_beside_a_compressor_is_vanilla_in_a_sweep_only(hydra_folder: None) -> None:
    cfg = compose("eval", ["budget=full", "compressor=random"])
    with pytest.raises(ConfigError, match="needs a budget"):
        evaluation_plan(cfg)
    plan = evaluation_plan(cfg, of_sweep=True)
    assert isinstance(plan.compressor, vzip.Identity) and plan.tower_cache_gib > 0
    assert str(plan.evaluation["run_dir"]).endswith("none-full/seed0")
    usual = resolved(compose("eval", []))
    assert full_is_vanilla(usual, config_dir()) is usual


def test_only_jobs_that_cannot_be_are_refused_beforehand() -> None:
    check_overrides(["-m", "budget=full,64tok", "compressor=visionzip,random"], config_dir(), "eval")
    with pytest.raises(ConfigError, match="compressor=none keeps every visual token"):
        check_overrides(["-m", "budget=full,64tok", "compressor=visionzip,none"], config_dir(), "eval")
    with pytest.raises(ConfigError, match="needs a budget"):
        check_overrides(["-m", "budget=full", "compressor=visionzip"], config_dir(), "train")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"eval.limit": 3},
        {"budget.num_dominant": 9},
        {"model.projector_sha256": "b"},
        {"eval.tasks": ["x"]},
        {"compressor.seed": 1},
    ],
    ids=str,
)
def test_a_record_of_other_settings_is_not_taken(hydra_folder: None, tmp_path: Path, change: dict[str, Any]) -> None:
    config = resolved(compose("eval", []))
    config["model"]["projector_sha256"] = "a"
    record = {"model": {}, "compressor": {"name": "VisionZip"}, "visual_tokens": {}, "tasks": {}, "provisional": False}
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 1, "config": config, **record}))
    assert same_run(tmp_path, config) is not None
    ((key, value),) = change.items()
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = value
    assert same_run(tmp_path, config) is None
    with pytest.raises(RunExistsError, match="of other settings: set overwrite=true"):
        evaluation_plan(compose("eval", [f"paths.run_dir={tmp_path}"]), of_sweep=True)


def test_an_average_that_would_mix_units_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=1",
        "eval.tasks=[gqa,mme]",
        "budget.num_dominant=range(9,20)",
    ]
    monkeypatch.setattr(sys, "argv", ["eval.py", "-m", *words])
    monkeypatch.setattr(reuse, "load_vlm", lambda **_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as end:
        script("eval").main()
    assert end.value.code == 2
    (entry,) = tmp_path.rglob("jobs/0000.json")
    assert "mme is scored in points, the others are shares" in json.loads(entry.read_text())["error"]


def test_a_sweeps_words_may_stand_anywhere_and_the_model_changes_last() -> None:
    words = ["eval=scenes", "budget=32tok,64tok", "-m", "model=tiny,llava_local", "+exp=a", "model.dtype=float32"]
    arranged = ["-m", "model=tiny,llava_local", "+exp=a", "model.dtype=float32", "eval=scenes", "budget=32tok,64tok"]
    assert arrange(words) == arranged
    assert arrange(["budget=32tok", "model=tiny"]) == ["budget=32tok", "model=tiny"]


def test_words_that_tell_jobs_apart() -> None:
    assert distinct_words([["a=1", "b=2"], ["a=1", "b=3"]]) == [("b=2",), ("b=3",)]
    assert distinct_words([["a=1", "b=2"]]) == [("a=1", "b=2")]
    assert SweepCallback.folder is None


def test_the_slurm_launcher_has_a_gpu_for_each_job(hydra_folder: None) -> None:
    words = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "paths.runs_dir=x"]
    launcher = compose("eval", words, return_hydra_config=True).hydra.launcher
    target = hydra.utils.get_class(launcher._target_)
    assert (target.__name__, launcher.gpus_per_node, launcher.partition) == ("SlurmLauncher", 1, "gpu")
    assert launcher.submitit_folder.startswith("x/sweeps/")


def test_processes_of_one_machine_get_a_gpu_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def process() -> str | None:
        monkeypatch.setattr("vzip.sweep.sweep._claims", {})
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
        gpu = pin_gpu(tmp_path)
        assert gpu == os.environ["CUDA_VISIBLE_DEVICES"] == pin_gpu(tmp_path), "the process's next job"
        return gpu

    assert [process(), process()] == ["5", "7"]
    with pytest.raises(ConfigError, match=r"2 GPUs \(5, 7\).*hydra.launcher.n_jobs=2"):
        process()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("vzip.sweep.sweep._claims", {})
    assert pin_gpu(tmp_path) is None


def in_a_process(command: list[str], folder: Path, *words: str) -> tuple[str, Path]:
    """Runs eval.py as a user does, without the fixture's budget; returns its output and the sweep's folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    usual = [word for word in command[1:] if not word.startswith("budget.")]
    line = [sys.executable, str(config_dir().parent / "eval.py"), "-m", *words, *usual]
    ended = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (made,) = (folder / "runs/sweeps").iterdir()
    return ended.stdout, made


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]],
    ids=["joblib", "submitit"],
)
def test_jobs_in_processes_of_their_own(command: list[str], tmp_path: Path, launcher: list[str]) -> None:
    # The full jobs are one run, which one of two processes makes while the other waits.
    shown, folder = in_a_process(command, tmp_path, *launcher, "budget=full,17tok", "compressor=visionzip,random")
    found = records(tmp_path / "runs/mine/my-checkpoint")
    assert sorted(found) == ["none-full/seed0", "random-17tok/seed0", "visionzip-17tok/seed0"]
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [row["words"] for row in rows] == [
        "budget=full",
        *(f"budget=17tok compressor={name}" for name in ("visionzip", "random")),
    ]
    assert "3 jobs" in shown


@pytest.mark.slow
def test_optuna_searches_the_split(command: list[str], tmp_path: Path) -> None:
    words = ["+exp=tiny_64tok_split", "hydra.sweeper.n_trials=3", "eval.limit=2"]
    folder = in_a_process(command, tmp_path, *words)[1]
    best = OmegaConf.load(folder / "optimization_results.yaml")
    budgets = [record["config"]["budget"] for record in records(tmp_path / "runs").values()]
    assert budgets and all(budget["num_dominant"] + budget["num_contextual"] == 64 for budget in budgets)
    assert best.best_params["budget.num_dominant"] in [budget["num_dominant"] for budget in budgets]
    averages = [float(row["average"]) for row in csv.DictReader((folder / "summary.csv").open())]
    assert best.best_value == max(averages)
