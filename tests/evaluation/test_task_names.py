"""Names of tasks, read from their files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vzip.errors import ConfigError
from vzip.evaluation.benchmarks.task_names import OWN_TASKS, names_in, refuse_unknown


def test_every_task_of_lmms_eval_has_its_name_in_a_file() -> None:
    tasks = pytest.importorskip("lmms_eval.tasks")
    from vzip.evaluation.benchmarks.catalog import built_in_tasks

    found = {*names_in(Path(tasks.__file__).parent), *names_in(OWN_TASKS)}
    assert set(built_in_tasks().all_tasks) <= found


def test_an_unknown_name_is_refused_without_importing_lmms_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmms_eval")
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)  # importing it would fail
    (tmp_path / "mine.yaml").write_text("task: my_task  # mine\n")
    (tmp_path / "both.yaml").write_text("group: my_group\ntask:\n  - my_task\n  - 'pope'\n")
    refuse_unknown(["my_task", "my_group", "pope", "mmvet_direct"], tmp_path)
    with pytest.raises(ConfigError, match=r"no such task: my_tusk\..*\(did you mean 'my_task'\?\)\.$"):
        refuse_unknown(["my_tusk", "pope"], tmp_path)
