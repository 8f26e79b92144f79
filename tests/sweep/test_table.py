"""`python -m vzip table`: words, parts of a table, records found by their settings, and what is missing evaluated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.config.kit import command  # noqa: F401  the fixture: a tiny checkpoint and a task

from vzip.cli import main
from vzip.errors import ConfigError
from vzip.models import model_cache as reuse
from vzip.models.load import load_vlm
from vzip.report.table_files import read_table
from vzip.results.record import Run, find_runs
from vzip.sweep import execute as running
from vzip.sweep import table as of_table
from vzip.sweep.execute import run_plan
from vzip.sweep.plan import Todo, hours, missing, missing_tasks, plan, runs_of
from vzip.sweep.table import run_all, select


def test_only() -> None:
    table = select(read_table("1"), "GQA,pope,64,VisionZip")
    assert [column.key for column in table.columns] == ["gqa", "pope"]
    assert len(table.average_over) == 11, "the printed average is over all columns, and ours says over how many"
    assert select(read_table("16"), "memory").average_over == ()
    assert [row.label for row in table.rows] == ["576, vanilla", "64, VisionZip"], "vanilla stays, for retention"
    assert select(read_table("1"), None) == read_table("1")
    with pytest.raises(ConfigError, match=r"--only gqe: not in table 1 \(did you mean 'gqa'\?\); columns"):
        select(read_table("1"), "gqe")
    with pytest.raises(ConfigError, match=r"no row has both .* rows of table 1: 576, vanilla; 192, FastV"):
        select(read_table("1"), "vanilla,64")


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
    assert "gqa" not in left and {"pope_splits", "mmvet_direct"} <= set(left)
    # Some questions are not all of them.
    assert "gqa" in missing_tasks(table, row, plain, [run(plain.config, limit=5)])[0]


def test_times_are_of_runs_of_their_own(tmp_path: Path) -> None:
    table = select(read_table("7"), "vanilla 13b")
    planned = plan(table, [], tmp_path)
    assert missing_tasks(table, table.rows[0], planned["2880, vanilla 13B"], []) == [["textvqa_val_ocr"]]


def test_a_cost_alone_asks_for_a_run_once(tmp_path: Path) -> None:
    table = select(read_table("6"), "memory,vanilla 7b")
    planned = plan(table, [], tmp_path)["2880, vanilla 7B"]
    row = table.row("2880, vanilla 7B")
    assert missing_tasks(table, row, planned, []) == [list(planned.config["eval"]["tasks"])]
    on_cpu = Run(tmp_path / "run.json", {"tasks": {}, "limit": None, "peak_memory_gib": {"process": 1, "cuda": None}})
    assert missing_tasks(table, row, planned, [on_cpu]) == [], "another run here would not tell it either"


def test_answers_that_wait_for_a_judge_are_not_asked_for_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = select(read_table("3"), "136,msvd,tgif")
    planned = plan(table, [], tmp_path)
    entry = {"metrics": {"exact_match": {"value": 0.0, "standard_error": None}}, "unit": "fraction", "num_samples": 9}
    config = planned["136, VisionZip"].config
    record: dict[str, Any] = {"config": config, "limit": None, "tasks": {"msvd_qa_zero_shot": entry}}
    answered = Run(tmp_path / "seed0" / "run.json", record)
    todos = missing(table, planned, [], tmp_path, [answered], [])
    assert [(todo.program, todo.tasks) for todo in todos] == [
        ("eval.py", ("tgif_qa_zero_shot", "msvd_qa_zero_shot")),
        ("eval.py", ("tgif_qa_zero_shot",)),
        ("judge", ()),
    ]
    assert todos[-1].command == f"python -m vzip judge {tmp_path / 'seed0'}"
    of_table.print_todos(todos, [])
    assert "a judge model costs money: --run leaves it to you" in capsys.readouterr().err
    assert run_all(todos[-1:], None) == [], "nothing is asked"
    entry["metrics"]["judge_accuracy"] = {"value": 0.5, "standard_error": None}
    assert "judge" not in [todo.program for todo in missing(table, planned, [], tmp_path, [answered], [])]


def test_after_a_run_what_a_judge_has_to_score_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = Todo("136, VisionZip", "judge", ("runs/seed0",))
    todos = iter([[Todo("136, VisionZip", "eval.py", ("+exp=x",))], [answered, Todo("136, VisionZip", "bench", ())]])
    monkeypatch.setattr(of_table, "missing", lambda *_: next(todos))
    monkeypatch.setattr(of_table, "hours", lambda *_: None)
    monkeypatch.setattr(of_table, "run_one", lambda *_: True)
    assert main(["table", "3", "--run", "--runs", str(tmp_path)]) == 0
    after = capsys.readouterr().err.split("1/1 row")[1]
    assert "python -m vzip judge runs/seed0" in after and "bench" not in after


def test_words_that_change_a_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"would not be the paper's any more: model.dtype=float32 \(recipe: float16\)"
    ):
        plan(select(read_table("1"), "64"), ["model.dtype=float32"], tmp_path)
    with pytest.raises(ConfigError, match=r"paper's any more: eval.gen_kwargs={'max_new_tokens': 5"):
        plan(select(read_table("1"), "64"), ["eval.gen_kwargs.max_new_tokens=5"], tmp_path)


def todos_of(name: str, only: str, runs_dir: Path, runs: Sequence[Run] = ()) -> list[Todo]:
    table = select(read_table(name), only)
    return missing(table, plan(table, [], runs_dir), [], runs_dir, runs, [])


def test_what_fills_a_table_trainings_first_then_the_bench_then_model_by_model() -> None:
    commands = [todo.command for todo in todos_of("18", "prefill,textvqa_seconds", Path("runs"))]
    assert commands[:4] == [
        "python -m vzip bench model=llava_next_13b budget=32tok dtype=float16",
        "python -m vzip bench model=llava_next_13b budget=128tok dtype=float16",
        "python -m vzip bench model=llava_next_13b budget=64tok dtype=float16",
        "python -m vzip bench model=llava_next_7b budget=32tok dtype=float16",
    ]
    assert len(commands) == 9 and commands[-1].startswith("python eval.py +exp=llava_next_7b_vanilla")
    tuned = todos_of("1", "64,visionzip‡,gqa", Path("elsewhere"))
    assert [todo.program for todo in tuned] == ["train.py", "eval.py", "eval.py"]
    final = Path("elsewhere/train/projector/llava15_7b_64tok/visionzip-64tok/seed0/final")
    assert tuned[0].words == ("+exp=llava15_7b_64tok", "paths.runs_dir=elsewhere") and tuned[0].makes == final
    assert tuned[2].waits_for == final and tuned[2].tasks == ("gqa",) and tuned[1].waits_for is None


def test_two_stages_follow_each_other() -> None:
    first, second, vanilla, ours = todos_of("11", "64", Path("runs"))
    before = "runs/train/projector_pretrain/llava15_7b_64tok_stage1/visionzip-64tok/seed0/final"
    assert first.words == ("+exp=llava15_7b_64tok_stage1",) and str(first.makes) == before
    assert second.words == ("+exp=llava15_7b_64tok_stage2", f"model.projector={before}")
    assert ours.waits_for == second.makes and vanilla.waits_for is None


def test_the_training_a_table_tells_of_is_asked_for_even_where_all_scores_are_there() -> None:
    compressed = todos_of("17", "training_hours,trained with visionzip", Path("runs"))
    assert [todo.command for todo in compressed] == [
        "python train.py +exp=llava_next_7b_640tok_trained compressor=none budget=full",
        "python train.py +exp=llava_next_7b_640tok_trained",
    ]


def test_hours_from_records_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vzip.sweep.plan.hardware", lambda: {"cpu": "C", "gpus": []})
    vanilla, _ = todos_of("1", "64,visionzip,gqa,pope", tmp_path)
    known = {
        "config": {"model": {"name_or_path": vanilla.config["model"]["name_or_path"]}},
        "hardware": {"cpu": "C", "gpus": []},
        "wall_time_s": 72.0,
        "tasks": {task: {"num_samples": 20} for task in vanilla.tasks},
        "data": {task: {"num_rows": 9_000} for task in vanilla.tasks},
    }
    assert hours(vanilla, [Run(tmp_path, known)]) == pytest.approx(72 / 40 * 18_000 / 3600)
    assert hours(vanilla, [Run(tmp_path, known | {"hardware": {"cpu": "D"}})]) is None
    assert hours(vanilla, [Run(tmp_path, known | {"num_resumed_answers": 3})]) is None
    assert hours(vanilla, [Run(tmp_path, known | {"tower_cache": {"num_hits": 3}})]) is None
    assert hours(vanilla, [Run(tmp_path, known | {"tasks": {"mme": {"num_samples": 5}}})]) is None


def test_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["table", "1", "--only", "64,gqa", "--runs", str(tmp_path), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert "| 64 | VisionZip | paper | 55.1 |" in out and "|  |  | ours |  |" in out
    assert main(["table", "99"]) == 2 and "no such table" in capsys.readouterr().err
    assert main(["table", "1", "eval.limit=3"]) == 2 and "need --run" in capsys.readouterr().err
    assert main(["table", "1", "--train", "inline"]) == 2 and "needs --run" in capsys.readouterr().err
    assert main(["table", "7", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "1714" in shown.out and "python eval.py +exp=llava_next_7b_vanilla" in shown.err
    assert "hours of 3 evaluations are not known" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_run_evaluates_what_is_missing_and_nothing_twice(
    command: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A table of tiny runs, in this process."""
    pytest.importorskip("lmms_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    common = [w for w in command if w.startswith(("model", "eval.include", "eval.tasks", "eval.batch"))]
    rows = [
        {"tokens": 16, "method": "vanilla", "run": " ".join([*common, "compressor=none", "budget=full"])},
        {"tokens": 8, "method": "VisionZip", "run": " ".join([*common, *(w for w in command if "budget" in w)])},
    ]
    own = {"mine": {"title": "Mine", "unit": "percent", "task": "mine", "metric": "exact_match"}}
    content = {"name": "own", "title": "t", "source": "here", "own_columns": own, "columns": ["mine"]}
    (tmp_path / "own.json").write_text(json.dumps(content | {"average_over": ["mine"], "rows": rows}))
    calls = []

    def counting(plan: Any) -> Any:
        calls.append(plan)
        return run_plan(plan)

    monkeypatch.setattr(running, "run_plan", counting)
    loaded = []
    monkeypatch.setattr(reuse, "KEEPER", reuse.ModelKeeper())
    monkeypatch.setattr(reuse, "load_vlm", lambda *a, **k: loaded.append(k) or load_vlm(*a, **k))
    arguments = ["table", "own.json", "--runs", str(runs), "--format", "csv"]
    assert main([*arguments, "--dry-run"]) == 0 and not runs.exists()
    assert capfd.readouterr().err.count("python eval.py model=llava_local") == 2
    assert main([*arguments, "--run"]) == 0
    assert len(calls) == 2 and len(find_runs(runs)) == 2 and len(loaded) == 1, "one model for both rows"
    lines = capfd.readouterr().out.splitlines()
    ours = [line for line in lines if line.startswith("own,")]
    assert len(ours) == 2 and all("/run.json" in line for line in ours)
    assert main([*arguments, "--run"]) == 0 and len(calls) == 2, "what has a record is not run again"


def test_one_that_fails_does_not_keep_the_others_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tried: list[Todo] = []

    def run_one(todo: Todo, launcher: str | None) -> bool:
        tried.append(todo)
        if todo.makes is not None:
            todo.makes.mkdir(parents=True)
        return len(tried) != 2

    monkeypatch.setattr(of_table, "run_one", run_one)
    todos = todos_of("1", "64,gqa", tmp_path)
    assert [todo.program for todo in todos] == ["train.py", *["eval.py"] * 5]
    failed = run_all(todos, None)
    assert [todo.label for todo in tried] == [
        "576, vanilla",
        "64, FastV",
        "64, SparseVLM",
        "64, VisionZip",
    ] and failed == [todos[2].command]
    assert "left out, for" in capsys.readouterr().err
    assert run_all(todos, "inline") == [] and [todo.label for todo in tried[4:]] == [
        "64, VisionZip‡",
        "576, vanilla",
        "64, FastV",
        "64, SparseVLM",
        "64, VisionZip",
        "64, VisionZip‡",
    ]


def test_what_each_command_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started = []
    monkeypatch.setattr(of_table, "_process", lambda words: started.append(words) or True)

    def refuse(words: Sequence[str]) -> None:
        raise ConfigError(f"no: {words}")

    monkeypatch.setattr(of_table, "evaluate_words", refuse)
    train = Todo("r", "train.py", ("+exp=a",))
    bench = Todo("r", "bench", ("model=m",))
    alone, several = (Todo("r", "eval.py", ("b",), {"launcher": {"num_processes": n}}) for n in (1, 2))
    assert [of_table.run_one(todo, "ddp") for todo in (train, bench, several)] == [True, True, True]
    assert [Path(words[0]).name for words in started] == ["train.py", "-m", "eval.py"]
    assert started[0][1:] == ["+exp=a", "launcher=ddp"] and started[1] == ["-m", "vzip", "bench", "model=m"]
    assert not of_table.run_one(alone, None) and "ConfigError: no: ('b',)" in capsys.readouterr().err


def test_another_sources_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["table", "--protocol", "B", "--runs", str(tmp_path), "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| 64 | DivPrune + Cen |  | published | 96.2 |" in shown and "ocr candidates: in the prompt" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "Q"], "--protocol Q: no such protocol"),
        (["1", "--protocol", "B"], "--protocol B: 1 goes with a table of the paper"),
        (["--protocol", "B", "--run", "--only", "64"], "--run --only goes with a table of the paper"),
        (["--protocol", "B", "--format", "csv"], "--format csv goes with a table"),
        ([], "say which table: 1, 2, 3"),
    ],
)
def test_what_does_not_go_with_another_source(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", *words]) == 2
    assert message in capsys.readouterr().err
