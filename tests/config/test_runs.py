"""What a good command line turns into: plain arguments, and a run directory of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tests.config.kit import script

import vzip
import vzip.evaluation.run
import vzip.report.table
from vzip.config.build import evaluation_plan, resolved, unchanged_recipe
from vzip.config.options import config_dir
from vzip.config.run_directory import run_directory, training_directory
from vzip.errors import ConfigError

ROOT = config_dir().parent


@pytest.fixture
def hydra_folder() -> Iterator[None]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield


def config_of(*words: str) -> dict[str, Any]:
    return resolved(compose("eval", list(words)))


DIRECTORIES = {
    (): "runs/scenes/tiny/visionzip-64tok/seed0",
    ("compressor=none", "budget=full", "seed=3"): "runs/scenes/tiny/none-full/seed3",
    ("pruner=none",): "runs/scenes/tiny/visionzip-64tok/seed0",
    ("pruner=fastv",): "runs/scenes/tiny/visionzip+fastv-64tok/seed0",
    ("compressor=none", "budget=full", "pruner=fastv", "pruner.keep=30"): (
        "runs/scenes/tiny/none+fastv_keep-30-full/seed0"
    ),
    ("+exp=llava15_7b_64tok",): "runs/paper_image/llava15_7b_64tok/visionzip-64tok/seed0",
    ("+exp=llava15_7b_64tok", "budget=128tok"): "runs/paper_image/llava15_7b_64tok/visionzip-128tok/seed0",
    ("model=llava15_7b", "eval=quick"): "runs/quick_limit-500/llava15_7b/visionzip-64tok/seed0",
    # A changed setting that changes results is written out; where and how fast it runs is not.
    ("budget.num_dominant=50",): "runs/scenes/tiny/visionzip-50+10/seed0",
    ("compressor.merge_rule=mean",): "runs/scenes/tiny/visionzip_merge_rule-mean-64tok/seed0",
    ("model.preprocess=hf",): "runs/scenes/tiny_preprocess-hf/visionzip-64tok/seed0",
    ("model=llava_local", "model.name_or_path=some/where/mine"): "runs/paper_no_judge/mine/visionzip-64tok/seed0",
    ("eval.tasks=[mine,other]",): "runs/mine+other/tiny/visionzip-64tok/seed0",
    ("eval.gen_kwargs.num_beams=3",): "runs/scenes_num_beams-3/tiny/visionzip-64tok/seed0",
    ("eval.batch_size=2", "model.device_map=auto", "eval.trackers=[wandb]"): "runs/scenes/tiny/visionzip-64tok/seed0",
    ("compressor=random", "seed=5"): "runs/scenes/tiny/random-64tok/seed5",
    ("paths.runs_dir=/elsewhere",): "/elsewhere/scenes/tiny/visionzip-64tok/seed0",
    ("paths.run_dir=here",): "here",
    ("model.projector=a/b",): "runs/scenes/tiny_projector-a-b/visionzip-64tok/seed0",
    ("model.compile=[tower,decode]",): "runs/scenes/tiny_compile-tower+decode/visionzip-64tok/seed0",
    ("+exp=tiny_32tok", "model.compile=[decode]"): "runs/scenes/tiny_32tok_compile-decode/visionzip-32tok/seed0",
    ("+exp=tiny_32tok_tuned",): "runs/scenes/tiny_32tok_tuned/visionzip-32tok/seed0",
    ("+exp=tiny_32tok", "model.projector=trained"): "runs/scenes/tiny_32tok_projector-trained/visionzip-32tok/seed0",
}
TRAINING_DIRECTORIES = {
    ("+exp=tiny_32tok",): "runs/train/tiny_projector/tiny_32tok/visionzip-32tok/seed0",
    ("+exp=tiny_32tok_tuned", "seed=2"): "runs/train/tiny_projector/tiny_32tok/visionzip-32tok/seed2",
    ("train=projector",): "runs/train/projector/tiny/visionzip-64tok/seed0",
    ("train=projector", "model.projector=trained"): "runs/train/projector/tiny/visionzip-64tok/seed0",
    ("train=projector", "train.learning_rate=0.1", "train.save_every=7"): (
        "runs/train/projector_learning_rate-0.1/tiny/visionzip-64tok/seed0"
    ),
    ("paths.run_dir=here",): "here",
}


@pytest.mark.parametrize("words", list(DIRECTORIES), ids=" ".join)
def test_run_directory(words: tuple[str, ...], hydra_folder: None) -> None:
    assert run_directory(config_of(*words), config_dir()) == Path(DIRECTORIES[words])


@pytest.mark.parametrize("words", list(TRAINING_DIRECTORIES), ids=" ".join)
def test_training_directory(words: tuple[str, ...], hydra_folder: None) -> None:
    assert training_directory(config_of(*words), config_dir()) == Path(TRAINING_DIRECTORIES[words])


def test_a_changed_recipe_is_not_the_recipe(hydra_folder: None, caplog: pytest.LogCaptureFixture) -> None:
    recipe = "+exp=llava15_7b_64tok"
    same = ("eval.limit=5", "eval.batch_size=4", "seed=1", "model.device_map=cpu", "paths.runs_dir=x")
    assert unchanged_recipe(config_of(recipe, *same), "eval") == "llava15_7b_64tok"
    logging.getLogger("vzip").propagate = True
    for change, named in (
        ("budget=128tok", "budget.num_dominant=108 (recipe: 54)"),
        ("model.preprocess=hf", "model.preprocess=hf (recipe: llava)"),
        ("compressor.merge_rule=mean", "compressor.merge_rule=mean (recipe: sum)"),
        ("compressor=random", "compressor.name=random (recipe: visionzip)"),
        ("pruner=fastv", "pruner.name=fastv (recipe: none)"),
        ("eval.tasks=[pope]", "eval.tasks=['pope']"),
        ("model.revision=null", "model.revision=null"),
    ):
        caplog.clear()
        assert unchanged_recipe(config_of(recipe, change), "eval") is None
        assert named in caplog.text


def test_a_limit_that_a_task_cannot_have_is_refused_before_the_model_is_loaded(hydra_folder: None) -> None:
    plan = evaluation_plan(compose("eval", ["eval=paper_image", "eval.tasks=[gqa,mme]", "eval.limit=7"]))
    with pytest.raises(ConfigError, match="limit=7: mme scores 2 questions about an image together"):
        plan.check_tasks(None)


def test_plain_arguments(hydra_folder: None) -> None:
    words = ["model=llava15_13b", "compressor=random", "budget=32tok", "seed=4", "eval=paper_image", "eval.limit=9"]
    words += ["eval.gen_kwargs.max_new_tokens=7", "launcher.num_threads=2", "model.quantization=4bit"]
    plan = evaluation_plan(compose("eval", words))
    model = OmegaConf.load(config_dir() / "model/llava15_13b.yaml")
    assert isinstance(model, DictConfig)
    assert plan.model == {
        "name_or_path": "llava-hf/llava-1.5-13b-hf",
        "revision": model.revision,
        "dtype": "float16",
        "device_map": "auto",
        "attn_implementation": "sdpa",
        "compile": None,
        "quantization": "4bit",
        "preprocess": "llava",
        "projector": None,
        "adapter_path": None,
        "drop_padding": False,
        "row_newline": False,
        "positions": None,
        "fps": None,
        "min_frame_pixels": None,
        "max_frame_pixels": None,
        "num_frames": None,
        "drop_cls": False,
    }
    assert plan.compressor == vzip.RandomTokens(vzip.TokenBudget(num_dominant=27, num_contextual=5), seed=4)
    arguments = dict(plan.evaluation)
    record = arguments.pop("resolved_config")
    assert json.loads(json.dumps(record))["budget"]["num_dominant"] == 27, "plain containers only"
    assert arguments.pop("tasks")[0] == "gqa" and len(record["eval"]["tasks"]) == 12
    assert arguments.pop("system_prompt").startswith("A chat between a curious user and an artificial intelligence")
    assert arguments == {
        "limit": 9,
        "batch_size": 1,
        "num_workers": 2,
        "visual_cache_gib": 1.0,
        "on_problem": "refuse",
        "trackers": (),
        "include_path": None,
        "gen_kwargs": {"max_new_tokens": 7},
        "seed": 4,
        "run_dir": Path("runs/paper_image_max_new_tokens-7_limit-9/llava15_13b_quantization-4bit/random-32tok/seed4"),
        "overwrite": False,
    }
    assert (plan.num_threads, plan.scenes_dir, plan.tower_cache_gib) == (2, None, 0.0)


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_composed_configuration_can_be_shown(tmp_path: Path) -> None:
    shown = command("--cfg", "job", "--resolve", "+exp=llava15_7b_64tok", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    config = OmegaConf.create(shown.stdout)
    assert (config.recipe, config.compressor.budget.num_dominant) == ("llava15_7b_64tok", 54)
    assert list(tmp_path.iterdir()) == []


def test_a_users_error_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    ended = command("budget=full", folder=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert (
        ended.stderr.startswith("ConfigError: compressor=visionzip needs a budget") and "Traceback" not in ended.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(cfg: Any, of_sweep: bool) -> None:
        raise ZeroDivisionError("ours")

    module = script("eval")
    monkeypatch.setattr(module, "evaluation_plan", broken)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(ZeroDivisionError, match="ours"):
        module.main()
    assert "HYDRA_FULL_ERROR" not in os.environ
