"""``--config-dir DIR``: options of one's own, found, checked and listed as those of ``configs``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tests.config.kit import ROOT, Run

from vzip.cli.entry import entry_point
from vzip.config.build import evaluation_plan
from vzip.config.options import config_dir, own_folder_overrides, with_own_folder
from vzip.option_files import options, own_folder
from vzip.train.launch import launch_command
from vzip.train.settings import LaunchSettings


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a budget, a compressor, a model and a recipe; its name has a space."""
    files = {
        "budget/mine": "# Mine.\nname: mine\nnum_dominant: 20\nnum_contextual: 4\n",
        "compressor/plain": "# Mine.\ndefaults: [/compressor_base@_here_]\nname: plain\n_target_: vzip.UniformTokens\n",
        "model/little": "# Mine.\ndefaults: [tiny@_here_]\nname: little\ndtype: float32\n",
        "exp/own": "# @package _global_\n# Mine.\ndefaults:\n  - override /budget: mine\n"
        "  - override /compressor: plain\n  - override /model: little\n  - _self_\nrecipe: own\n",
    }
    for name, text in files.items():
        path = tmp_path / "of mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "of mine"


def _composed(monkeypatch: pytest.MonkeyPatch, words: list[str], name: str = "eval") -> list[dict]:
    """The resolved configurations that eval.py would run with, one a job."""
    seen: list[dict] = []

    def act(cfg: DictConfig) -> None:
        plan = evaluation_plan(cfg)
        command = launch_command(
            LaunchSettings(**{**_launcher(), "num_processes": 2}), Path("eval.py"), own_folder_overrides(), {}
        )
        sources = [source.provider for source in HydraConfig.get().runtime.config_sources]
        seen.append({**plan.evaluation["resolved_config"], "command": command, "sources": sources})

    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    entry_point(name)(act)()
    return seen


def _launcher() -> dict:
    from vzip.config.options import option_values

    return {key: value for key, value in option_values(config_dir(), "launcher", "inline").items() if key != "name"}


@pytest.mark.parametrize("flag", [["--config-dir", "DIR"], ["--config-dir=DIR"], ["-cd", "DIR"]])
def test_a_recipe_of_one_s_own(own: Path, flag: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["seed=3", *(word.replace("DIR", str(own)) for word in flag), "+exp=own", f"paths.runs_dir={tmp_path}"]
    (config,) = _composed(monkeypatch, words)
    assert config["recipe"] == "own", "known as a recipe, and unchanged"
    assert config["budget"] == {"name": "mine", "num_dominant": 20, "num_contextual": 4, "scope": "crop"}
    assert config["compressor"]["_target_"] == "vzip.UniformTokens" and config["model"]["dtype"] == "float32"
    assert config["paths"]["run_dir"] == str(tmp_path / "scenes/own/plain-mine/seed3")
    assert config["command"][-2:] == ["--config-dir", str(own)], "the processes that are started find it too"
    assert own_folder() is None and "mine" not in options(config_dir(), "budget"), "for this command only"


def test_a_sweep_over_one_s_own(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["budget=mine,48tok,64tok", "-m", "--config-dir", str(own), f"paths.runs_dir={tmp_path}"]
    names = [config["budget"]["name"] for config in _composed(monkeypatch, words)]
    assert names == ["mine", "48tok", "64tok"]
    (folder,) = (tmp_path / "sweeps").iterdir()
    assert (
        '"run_dir": "' + str(tmp_path / "scenes/tiny/visionzip-mine/seed0") in (folder / "jobs/0000.json").read_text()
    )


@pytest.mark.parametrize("program", ["eval", "train"])
def test_errors_list_it(own: Path, run: Run, program: str) -> None:
    code, said = run("--config-dir", str(own), "budget=min", "compressor=plane", name=program)
    assert code == 2 and "budget=min: no such option (did you mean 'mine'?)" in said and "       mine\n" in said
    assert "did you mean 'plain'?" in said
    code, said = run("budget=mine", name=program)
    assert code == 2 and "budget=mine: no such option" in said, "without the flag there is none"
    code, said = run("--config-dir", str(own), "model=little", "compressor=plain", "budget=full", name=program)
    assert code == 2 and "compressor=plain needs a budget" in said


def test_a_folder_that_cannot_be_used(own: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "wrong" / "budgets").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for words, message in {
        ("--config-dir", "nowhere"): "--config-dir nowhere: no such folder",
        ("--config-dir",): "--config-dir: no such folder",
        ("--config-dir", "wrong"): "its folders are budgets (did you mean 'budget'?); groups: budget, compressor",
        ("--config-dir=empty",): "it has no folders",
        ("--config-dir", "wrong", "-cd", "empty"): "--config-dir wrong empty: one folder",
    }.items():
        code, said = run(*words)
        assert code == 2 and message in said, words
    (own / "budget" / "64tok.yaml").write_text("name: 64tok\nnum_dominant: 1\nnum_contextual: 1\n")
    code, said = run("--config-dir", str(own))
    assert code == 2 and "64tok.yaml: budget=64tok is an option of vzip's already" in said
    code, said = run("--config-dir", str(ROOT / "configs"), "dry_run=true")
    assert code == 0, "the shipped folder itself hides nothing"


def test_help_has_it(own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with with_own_folder(["--config-dir", str(own), "--help"]) as words:
        assert words[0] == "--config-dir" and "mine" in options(config_dir(), "budget")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--help", "--config-dir", str(own)])
    entry_point("eval")(lambda cfg: None)()
    assert ", mine, " in capsys.readouterr().out
