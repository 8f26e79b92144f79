"""`python -m vzip table`: words, parts of a table, records found by their settings, and what is missing evaluated."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.config.test_bad_input import script
from tests.config.test_end_to_end import command  # noqa: F401  the fixture: a tiny checkpoint and a task

from vzip.cli import main
from vzip.config import table as of_table
from vzip.config.table import missing_tasks, plan, run_missing, runs_of, select
from vzip.errors import ConfigError
from vzip.report.paper_tables import read_table
from vzip.report.record import Run, find_runs


def test_only() -> None:
    table = select(read_table("1"), "GQA,pope,64,VisionZip")
    assert [column.key for column in table.columns] == ["gqa", "pope"] and table.average_over == ("gqa", "pope")
    assert [row.label for row in table.rows] == ["576, vanilla", "64, VisionZip"], "vanilla stays, for retention"
    assert select(read_table("1"), None) == read_table("1")
    with pytest.raises(ConfigError, match=r"--only gqe: not in table 1 \(did you mean 'gqa'\?\); columns"):
        select(read_table("1"), "gqe")


def test_rows_of_the_paper_compose_and_find_their_records(tmp_path: Path) -> None:
    table = select(read_table("1"), "64,vanilla,visionzip,visionzip‡")
    planned = plan(table, ["eval.batch_size=4"], tmp_path)
    assert list(planned) == ["576, vanilla", "64, VisionZip", "64, VisionZip‡"]
    vanilla, plain, tuned = planned.values()
    assert (vanilla.config["budget"]["name"], plain.config["eval"]["batch_size"]) == ("full", 4)

    def run(config: Any, limit: int | None = None, **model: Any) -> Run:
        changed = {**config, "model": {**config["model"], **model}, "eval": {**config["eval"], "tasks": ["gqa"]}}
        tasks = {"gqa": {"metrics": {"exact_match": {"value": 1, "standard_error": None}}, "unit": "fraction"}}
        entry = {"config": changed, "seed": 0, "limit": limit, "provisional": False}
        return Run(tmp_path / "run.json", entry | {"tasks": {"gqa": tasks["gqa"] | {"num_samples": 1}}})

    weights = str(tmp_path / "train/projector/llava15_7b_64tok/visionzip-64tok/seed0/final")
    ours, theirs = run(plain.config), run(tuned.config, projector=weights)
    found = [ours, theirs, run(plain.config, dtype="float32"), run(plain.config | {"seed": 1})]
    assert [runs_of(entry, found) for entry in planned.values()] == [[], [ours], [theirs]]
    row = table.row("64, VisionZip")
    (left,) = missing_tasks(table, row, plain, [ours])
    assert "gqa" not in left and "pope" in left and "mmvet" not in " ".join(left)
    # Some questions are not all of them.
    assert "gqa" in missing_tasks(table, row, plain, [run(plain.config, limit=5)])[0]


def test_times_are_of_runs_of_their_own(tmp_path: Path) -> None:
    table = select(read_table("7"), "vanilla 13b")
    planned = plan(table, [], tmp_path)
    assert missing_tasks(table, table.rows[0], planned["2880, vanilla 13B"], []) == [["textvqa_val"]]


def test_words_that_change_a_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"would not be the paper's any more: model.dtype=float32 \(recipe: float16\)"
    ):
        plan(select(read_table("1"), "64"), ["model.dtype=float32"], tmp_path)


def test_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["table", "1", "--only", "64,gqa", "--runs", str(tmp_path), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert "| 64 | VisionZip | paper | 55.1 |" in out and "|  |  | ours |  |" in out
    assert main(["table", "99"]) == 2 and "no such table" in capsys.readouterr().err
    assert main(["table", "1", "eval.limit=3"]) == 2 and "need --run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_run_evaluates_what_is_missing_and_nothing_twice(
    command: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A table of tiny runs through eval.py's own main, in this process."""
    pytest.importorskip("lmms_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    common = [w for w in command if w.startswith(("model", "eval.include", "eval.tasks", "eval.batch"))]
    rows = [
        {"tokens": 16, "method": "vanilla", "run": " ".join([*common, "compressor=none", "budget=full"])},
        {"tokens": 8, "method": "VisionZip", "run": " ".join([*common, *(w for w in command if "budget" in w)])},
        {"tokens": 8, "method": "broken", "run": " ".join([*common, "budget.num_dominant=900"])},
    ]
    own = {"mine": {"title": "Mine", "unit": "percent", "task": "mine", "metric": "exact_match"}}
    content = {"name": "own", "title": "t", "source": "here", "own_columns": own, "columns": ["mine"]}
    (tmp_path / "own.json").write_text(json.dumps(content | {"average_over": ["mine"], "rows": rows[:2]}))
    called = []

    def evaluate(words: Sequence[str]) -> int:
        called.append(list(words))
        monkeypatch.setattr(sys, "argv", ["eval.py", *words])
        try:
            script("eval").main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    monkeypatch.setattr(of_table, "evaluate", evaluate)
    arguments = ["table", "own.json", "--runs", str(runs), "--format", "csv"]
    assert main([*arguments, "--run"]) == 0
    assert len(called) == 2 and len(find_runs(runs)) == 2
    lines = capfd.readouterr().out.splitlines()
    ours = [line for line in lines if line.startswith("own,")]
    assert len(ours) == 2 and all("/run.json" in line for line in ours)
    assert main([*arguments, "--run"]) == 0 and len(called) == 2, "what has a record is not run again"

    # One that fails does not keep the others from running, and is named.
    table = read_table("own.json")
    planned = plan(table, [], tmp_path / "elsewhere")
    tried = []
    failed = run_missing(
        table, planned, [], tmp_path / "elsewhere", lambda words: tried.append(words) or len(tried) == 1
    )
    assert len(tried) == 2 and len(failed) == 1 and failed[0].startswith("python eval.py ")
