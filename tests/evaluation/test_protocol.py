"""What is said of each benchmark, held against the installed task files."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.evaluation.benchmark_kit import task_file

from vzip.errors import ConfigError
from vzip.evaluation.benchmarks.catalog import OWN_TASKS, built_in_tasks, find_tasks, task_config
from vzip.evaluation.benchmarks.image_protocols import IMAGE
from vzip.evaluation.benchmarks.protocols import PROTOCOLS, protocol_of
from vzip.evaluation.benchmarks.video_protocols import VIDEO
from vzip.evaluation.lmms_eval.harness import check_lmms_eval
from vzip.evaluation.lmms_eval.plugin import manifests

CONFIGS = Path(__file__).parents[2] / "configs"
# These put what they add to a question into their code, not into lmms_eval_specific_kwargs.
PROMPT_IN_CODE = ("mathvista_rules", "seedbench", "seedbench_frame", "seedbench_image")


@pytest.fixture(scope="module")
def manager():
    check_lmms_eval()  # some task files need the environment that this sets
    return built_in_tasks()


@pytest.mark.parametrize("task", [*IMAGE, *(task for task, one in VIDEO.items() if not one.judge)])
def test_a_protocol_says_what_the_task_file_says(task, manager):
    protocol = PROTOCOLS[task]
    for package in protocol.packages:
        pytest.importorskip(package)
    config = task_config(manager, task)
    listed = {entry["metric"] for entry in config["metric_list"]}
    assert listed == {"answered"} if protocol.judge else set(protocol.primary.split("+")) <= listed
    assert config.get("output_type", "generate_until") == "generate_until"
    name = config.get("dataset_name")
    assert protocol.split == f"{name}/{config['test_split']}" if name else config["test_split"]
    if task in PROMPT_IN_CODE:
        return
    kwargs = config.get("lmms_eval_specific_kwargs", {"default": {"post_prompt": ""}})["default"]
    assert not kwargs.get("pre_prompt"), "nothing is put before the question"
    added = [kwargs[key] for key in ("post_prompt", "multiple_choice_prompt", "open_ended_prompt") if key in kwargs]
    assert added and all(text in protocol.prompt for text in added)
    assert ("OCR" in protocol.prompt) == bool(kwargs.get("ocr"))


def test_every_task_of_ours_has_a_protocol_and_a_name_of_its_own(manager):
    names = {path.stem for path in (OWN_TASKS / "image").glob("*.yaml")}
    assert names and names <= set(IMAGE)
    for name in names:
        assert manager.task_index[name]["yaml_path"] == str(task_file(name)), "lmms-eval's own would win"
        assert PROTOCOLS[name].difference or PROTOCOLS[name].paper


def test_our_tasks_are_found_without_reading_all_of_lmms_evals(include_path):
    manager = find_tasks(["pope_splits", "own_exact"], include_path)
    assert "gqa" not in manager.all_tasks and {"pope_splits", "own_exact"} <= set(manager.all_tasks)


def test_a_name_of_ours_is_refused_in_a_folder_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: pope_splits\ndataset_path: json\n")
    with pytest.raises(ConfigError, match=r"'pope_splits' of .* has the name of a built-in task"):
        find_tasks(["pope_splits", "seedbench_image"], tmp_path)


def test_a_task_of_ones_own_has_no_protocol():
    assert protocol_of("own_exact") is None


def test_quick_states_the_intervals_that_its_limit_gives():
    config = yaml.safe_load((CONFIGS / "eval/quick.yaml").read_text(encoding="utf-8"))
    text = (CONFIGS / "eval/quick.yaml").read_text(encoding="utf-8")
    stated = {task: (int(score), float(width)) for task, score, width in re.findall(r"(\w+) (\d+) ± ([\d.]+)", text)}
    assert list(stated) == config["tasks"]
    rng = np.random.default_rng(0)
    for task, (percent, width) in stated.items():
        if task == "pope_splits":  # recall 0.80 and precision 0.93 make the F1 of 86
            true = rng.integers(0, 2, (2000, config["limit"])).astype(bool)
            said = np.where(true, rng.random(true.shape) < 0.80, rng.random(true.shape) < 0.06)
            scores = 200 * (true & said).sum(axis=1) / (true.sum(axis=1) + said.sum(axis=1))
            assert scores.mean() == pytest.approx(percent, abs=0.5)
            assert 1.96 * scores.std() == pytest.approx(width, abs=0.06)
        else:
            assert 1.96 * math.sqrt(percent * (100 - percent) / config["limit"]) == pytest.approx(width, abs=0.06)


def test_lmms_evals_own_command_understands_our_task_files(monkeypatch):
    plain = {tag: make for tag, make in yaml.FullLoader.yaml_constructors.items() if tag != "!installed"}
    monkeypatch.setattr(yaml.FullLoader, "yaml_constructors", plain)
    with pytest.raises(yaml.constructor.ConstructorError, match="!installed"):
        yaml.full_load("include: !installed pope/pope.yaml")
    manifests()  # what lmms-eval calls when it is imported
    assert Path(yaml.full_load("include: !installed pope/pope.yaml")["include"]).is_file()
