"""A hub that cannot be reached, or wants a login, is said before a model is loaded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from vzip.errors import ManifestError
from vzip.evaluation.benchmarks import task_data
from vzip.evaluation.benchmarks.task_data import check_data, naming_data_errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch):
    """Checks tasks of these files against a hub at a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    task_data._ask_hub.cache_clear()

    def run(**files: dict[str, Any]) -> None:
        index = {
            name: {"type": "task", **({"task": file["task"]} if "task" in file else {})} for name, file in files.items()
        }
        monkeypatch.setattr(task_data, "task_config", lambda manager, name: files[name])
        check_data(SimpleNamespace(task_index=index), list(files))  # type: ignore[arg-type]

    return run


def test_local_data_asks_nobody(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/disk").mkdir(parents=True)
    check(
        a={"dataset_path": "parquet", "dataset_kwargs": {"token": True}},
        b={"dataset_path": "data/disk"},
        c={"dataset_path": "own/name", "dataset_kwargs": {"load_from_disk": True}},
        d={},
    )


def test_a_hub_out_of_reach_is_named_with_the_way_out(check):
    with pytest.raises(ManifestError, match=r"task b: its data set org/set is on the hub.*HF_HUB_OFFLINE=1.*prefetch"):
        check(a={"dataset_path": "json"}, b={"dataset_path": "org/set"})


def test_offline_nothing_is_asked(check, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check(b={"dataset_path": "org/set"})


def test_what_has_answered_is_not_asked_again(check, monkeypatch):
    asked: list[str] = []

    def answer(path: str, timeout: float) -> None:
        asked.append(path)
        if len(asked) == 1:
            raise ConnectionError("not yet")

    monkeypatch.setattr(task_data, "HfApi", lambda: SimpleNamespace(dataset_info=answer))
    with pytest.raises(ManifestError, match="not yet"):
        check(a={"dataset_path": "org/set"})
    for _ in range(2):  # before the model is loaded, and where the run begins
        check(a={"dataset_path": "org/set"})
    assert asked == ["org/set", "org/set"]


def test_a_task_that_wants_a_token_says_how_to_log_in(check, monkeypatch):
    monkeypatch.setattr(task_data, "HfApi", lambda: SimpleNamespace(dataset_info=lambda path, timeout: None))
    monkeypatch.setattr(task_data, "get_token", lambda: None)
    check(a={"dataset_path": "org/set"})
    with pytest.raises(ManifestError, match=r"task b: .*org/set.*hf auth login.*HF_TOKEN"):
        check(a={"dataset_path": "org/set"}, b={"dataset_path": "org/set", "dataset_kwargs": {"token": True}})
    monkeypatch.setattr(task_data, "get_token", lambda: "hf_x")
    check(b={"dataset_path": "org/set", "dataset_kwargs": {"token": True}})


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("no"), DatasetNotFoundError("no"), ConnectionError("no")])
def test_errors_of_loading_are_told(error):
    told = pytest.raises(ManifestError, match=r"the data of gqa, mme cannot be had: no\. .*HF_HUB_OFFLINE=1")
    with told, naming_data_errors(["gqa", "mme"]):
        raise error
    with pytest.raises(ZeroDivisionError), naming_data_errors(["gqa"]):
        raise ZeroDivisionError


@pytest.mark.whole
def test_the_command_ends_after_one_try_where_the_hub_is_silent(tmp_path, silent_server):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", "eval=quick", f"paths.runs_dir={tmp_path / 'runs'}"],
        env={**kept, "HF_ENDPOINT": silent_server.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ManifestError: task gqa: its data set") and "timed out" in last
    assert sum("/api/datasets/" in line for line in silent_server.asked) == 1 and not (tmp_path / "runs").exists()
