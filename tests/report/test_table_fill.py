"""Our runs beside the paper's numbers, cell by cell, and the table in every format."""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.records import COMPRESSED, VANILLA, put, record

from vzip.errors import ManifestError
from vzip.report.costs import find_benches
from vzip.report.paper_tables import PaperTable
from vzip.report.table_files import read_table
from vzip.report.table_fill import FilledRow, fill
from vzip.report.table_format import lay_out, to_csv
from vzip.results.layout import print_layout, to_latex, to_markdown
from vzip.results.record import Run, find_runs

OWN = {
    "name": "mine",
    "title": "a & b",
    "source": "here",
    "own_columns": {"mme2": {"title": "MME", "unit": "points", "task": "mme", "metric": "p+c"}},
    "columns": ["gqa", "mme2", "pope", "memory", "prefill", "pope_seconds"],
    "average_over": ["gqa", "mme2", "pope"],
    "notes": ["a remark"],
    "mismatches": [{"row": "64, VisionZip", "column": "gqa", "note": "another number elsewhere"}],
    "rows": [
        {"tokens": 576, "method": "vanilla", "run": "v", "bench": "model=m", "values": [80.0, 200, 80, None, 30, 90]},
        {"tokens": 64, "method": "Rival", "none": "not built", "values": [50, 100, None, None, None, None]},
        {
            "tokens": 64,
            "method": "VisionZip",
            "run": "c",
            "bench": "model=m budget=x",
            "values": [60, 150, 60, 7, 10, 45],
            "average": 75,
        },
    ],
}


@pytest.fixture
def table(tmp_path: Path) -> PaperTable:
    (tmp_path / "mine.json").write_text(json.dumps(OWN))
    return read_table(str(tmp_path / "mine.json"))


def put_bench(
    folder: Path,
    name: str,
    stages: dict[str, tuple[int, float]],
    processor: str = "H200",
    time: str = "2026-01-01",
    pruner: dict[str, Any] | None = None,
    compressor: str = "visionzip",
) -> None:
    content = {
        "model": "m",
        "environment": {"time": time, "processor": processor, "code": {"commit": "c", "dirty": processor == "dirty"}},
        "settings": {
            "batch_size": 1,
            "compressor": compressor,
            "method_settings": {"pruner": pruner} if pruner else {},
        },
        "methods": {
            k: {"num_visual_tokens": n, "stages": {"prefill": {"median_ms": t}}} for k, (n, t) in stages.items()
        },
    }
    place = folder / "runs" / "bench" / name / "z"
    place.mkdir(parents=True)
    (place / "bench.json").write_text(json.dumps(content))


@pytest.fixture
def filled(table: PaperTable, tmp_path: Path) -> list[FilledRow]:
    vanilla = put(tmp_path, "vanilla", record("Identity", (0.8, 1.7)), VANILLA)
    ours = put(tmp_path, "ours", record(scores=(0.4, 0.7), peak_memory_gib={"process": 1, "cuda": 2.0}), COMPRESSED)
    limited = record(scores=(0.9, 0.9), limit=5, provisional=True, created="2027", provisional_reasons=["limit=5"])
    other = put(tmp_path, "limited", limited, COMPRESSED)
    put_bench(tmp_path, "m", {"vanilla": (576, 33.0), "vzip": (64, 11.0)})
    assert [run.path for run in find_runs(tmp_path / "runs")] == [other.path, ours.path, vanilla.path]
    benches = find_benches(tmp_path / "runs")
    return fill(table, {"576, vanilla": [vanilla], "64, VisionZip": [ours, other]}, benches)


def test_the_protocols_differences_are_named(tmp_path: Path) -> None:
    columns = {"columns": ["gqa", "pope", "seed_image", "memory"], "average_over": []}
    rows = [{"tokens": 576, "method": "vanilla", "run": "v", "values": [80.0, 80, 70, 5]}]
    (tmp_path / "other.json").write_text(json.dumps(OWN | columns | {"rows": rows, "mismatches": []}))
    table = read_table(str(tmp_path / "other.json"))
    remarks = lay_out(table, fill(table, {})).remarks
    (named,) = [text for text in remarks if "; ours: " in text]  # GQA has no difference, SEED-I is no primary metric
    assert named.startswith("POPE, mean of the F1 of the random, popular and adversarial splits; ours: an answer other")


def test_cells(filled: list[FilledRow]) -> None:
    base, rival, row = filled
    gqa, mme, pope, memory, prefill, seconds = row.cells
    assert (gqa.ours, gqa.difference, gqa.ratio) == pytest.approx((40, -20, 0.5))
    assert gqa.difference_outside_noise and gqa.ratio_outside_noise and gqa.provisional == ()
    assert gqa.paired is not None and gqa.paired.is_paired and (gqa.paired.num_lost, gqa.paired.num_gained) == (20, 0)
    # Without a standard error nothing is outside the noise, however large it is.
    assert mme.ours == pytest.approx(100) and mme.ratio == pytest.approx(0.5)
    assert not mme.difference_outside_noise and not mme.ratio_outside_noise
    assert pope.ours is None and pope.reason is None
    assert memory.ours == 2048 and memory.difference == 2041
    assert prefill.ours == 11 and prefill.ratio == pytest.approx(3) and prefill.paper_ratio == pytest.approx(3)
    assert prefill.machine == "H200, batches of 1" and prefill.run == prefill.vanilla
    assert seconds.ours is None, "the time of two benchmarks is not the time of one"
    assert base.cells[0].ours == 80 and base.cells[0].ratio is None
    assert rival.cells[0].reason == "not built" and rival.cells[0].ours is None


def test_average_over_what_is_there(filled: list[FilledRow]) -> None:
    average = filled[2].average
    assert average is not None
    assert (average.paper, average.num, average.of, average.ours) == (75, 2, 3, pytest.approx(50))
    assert average.paper_same == pytest.approx(75)
    assert average.low is None, "mme has no interval, so their average has none"


def test_time_of_one_benchmark_and_never_of_a_resumed_run(table: PaperTable) -> None:
    def seconds(**change: Any) -> float | None:
        content = copy.deepcopy(record(**change))
        content["tasks"] = {"pope_splits": content["tasks"]["gqa"]}
        return fill(table, {"64, VisionZip": [Run(Path("x"), content)]})[2].cells[5].ours

    assert seconds() == 3.2
    assert seconds(num_resumed_answers=4) is None


def test_the_newest_measurements_of_one_machine_are_a_pair(
    table: PaperTable, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vzip"), "propagate", True)

    def prefill() -> Any:
        return fill(table, {}, find_benches(tmp_path / "runs"))[2].cells[4]

    put_bench(tmp_path, "a", {"vanilla": (590, 40.0)}, "A800", "2026-01-01")  # newlines included: 2.4 % more than 576
    put_bench(tmp_path, "b", {"vzip": (64, 10.0)}, "H200", "2026-01-02")
    assert prefill().ours == 10 and prefill().ratio is None, "two machines have no ratio"
    put_bench(tmp_path, "c", {"vzip": (64, 20.0)}, "A800", "2026-01-03")
    put_bench(tmp_path, "d", {"vzip": (63, 1.0), "vanilla": (700, 1.0)}, "A800", "2026-01-04")  # other budgets
    assert (prefill().ours, prefill().ratio, prefill().machine) == (20, 2, "A800, batches of 1")
    put_bench(tmp_path, "e", {"vzip": (64, 15.0), "vanilla": (576, 60.0)}, "A800", "2025-12-31")
    assert (prefill().ours, prefill().ratio) == (15, 4), "one measurement of both goes before two"
    put_bench(tmp_path, "g", {"vzip": (64, 2.0), "vanilla": (576, 60.0)}, "A800", "2026-01-05", compressor="divprune")
    assert prefill().ours == 15, "another method's is not VisionZip's"
    put_bench(tmp_path, "f", {"vzip": (64, 1.0)}, "dirty", "2027-01-01")
    assert prefill().ours == 15, "what is provisional comes last"
    (tmp_path / "runs/bench/a/z/bench.json").write_text("{}")
    assert prefill().ours == 15, "one that cannot be read is named and hinders no other"
    assert "is no measurement of `python -m vzip bench`" in caplog.text


def test_times_of_other_machines_or_other_numbers_of_questions_have_no_ratio(table: PaperTable) -> None:
    def seconds(**base: Any) -> Any:
        runs = {}
        for label, change in (("576, vanilla", {"wall_time_s": 9.6} | base), ("64, VisionZip", {})):
            content = copy.deepcopy(record(hardware={"cpu": "C", "gpus": []}) | change)
            content["tasks"] = {"pope_splits": content["tasks"]["gqa"] | change.get("task", {})}
            runs[label] = [Run(Path("x"), content)]
        return fill(table, runs)[2].cells[5]

    assert seconds().ratio == pytest.approx(3) and seconds().machine == "C"
    assert seconds(hardware={"cpu": "D", "gpus": []}).ratio is None
    assert seconds(hardware={"cpu": "C", "gpus": ["G"]}).ratio is None
    assert seconds(batch_size=8).ratio is None
    assert seconds(task={"num_samples": 5}).ratio is None and seconds(task={"num_samples": 5}).ours == 3.2


def test_hours_and_memory_of_a_training(tmp_path: Path) -> None:
    row = {"tokens": 64, "method": "trained", "run": "c", "train": ["t"], "values": [10, 100]}
    content = {"name": "own", "title": "t", "source": "s", "columns": ["training_hours", "training_memory"]}
    (tmp_path / "own.json").write_text(json.dumps(content | {"average_over": [], "rows": [row]}))
    table = read_table(str(tmp_path / "own.json"))
    run_dir = tmp_path / "training"
    (run_dir / "final").mkdir(parents=True)

    def cells() -> tuple[Any, ...]:
        return fill(table, {}, trainings={"64, trained": run_dir})[0].cells

    assert cells()[0].ours is None and cells()[0].command == ("python", "train.py", "t")
    times = {"data_ms": 600_000, "forward_ms": 300_000, "backward_ms": 800_000, "update_ms": 100_000}
    steps = [{"step": i, **times, "peak_memory_gib": i / 2} for i in range(1, 5)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert cells()[0].ours is None, "not finished"
    header = {"num_processes": 2, "hardware": {"cpu": "C", "gpus": ["A800", "A800", "A800"]}}
    (run_dir / "final/tuned.json").write_text(json.dumps(header))
    hours, memory = cells()
    assert (hours.ours, memory.ours) == (2.0, 2048.0) and hours.machine == memory.machine == "2 x A800"
    assert hours.run == run_dir / "metrics.jsonl" and hours.difference == -8
    (run_dir / "final/tuned.json").write_text(json.dumps({"hardware": {"cpu": "C", "gpus": []}}))
    hours, memory = cells()
    assert hours.ours == 2.0 and hours.machine == "C" and memory.ours is None, "a process's memory is no GPU's"
    (run_dir / "metrics.jsonl").write_text("{}")
    with pytest.raises(ManifestError, match="is no log of a training"):
        cells()


def test_provisional_runs_are_marked_and_come_last(table: PaperTable, tmp_path: Path) -> None:
    limited = record(scores=(0.9, 0.9), limit=5, provisional=True, provisional_reasons=["limit=5"])
    rows = fill(table, {"64, VisionZip": [Run(tmp_path / "run.json", limited)]})
    assert rows[2].cells[0].provisional == ("limit=5",)
    text = to_markdown(lay_out(table, rows))
    assert "| 90.0* |" in text and "- *: provisional: limit=5" in text
    # Vanilla on other questions is not what retention is taken against.
    vanilla = Run(tmp_path / "v.json", record("Identity", (0.8, 1.7)))
    rows = fill(table, {"64, VisionZip": [Run(tmp_path / "run.json", limited)], "576, vanilla": [vanilla]})
    assert rows[2].cells[0].ratio is None


def test_markdown(table: PaperTable, filled: list[FilledRow]) -> None:
    text = to_markdown(lay_out(table, filled))
    for line in (
        "| 64 | VisionZip | paper | 60.0 [1] | 150 | 60.0 | 7 | 10 | 45 | 75.0 |",
        "|  |  | ours | 40.0 | 100.0 |  | 2048 | 11.0 |  | 50.0 of 2/3 |",
        "|  |  | difference | **-20.0** | -50.0 |  | +2041.0 | +1.0 |  | -25.0 |",
        "|  |  | retention | **50.0** | 50.0 |  |  | 3.00x |  |  |",
        "|  |  | same answers | 60.0 |  |  |  |  |  |  |",
        "- prefill: ours on H200, batches of 1",
        "| 64 | Rival | paper | 50.0 | 100 |  |  |  |  |  |",
        "- [1] another number elsewhere",
        "- a remark",
    ):
        assert line in text, line
    assert text.count("ours") > 2 and "| Rival | ours" not in text


def test_latex_and_terminal(table: PaperTable, filled: list[FilledRow]) -> None:
    text = to_latex(lay_out(table, filled))
    assert r"\caption{a \& b (here)}" in text and r"\textbf{-20.0}" in text and r"Avg \%" in text
    assert all(line.count("&") == 9 for line in text.splitlines() if line.endswith(r"\\"))
    console = Console(width=40, record=True, file=io.StringIO())
    print_layout(lay_out(table, filled), console)
    shown = console.export_text(styles=True)
    assert re.search(r"\x1b\[1m *-20\.0", shown) and "…" not in shown


def test_csv_has_every_cell_with_its_origin(table: PaperTable, filled: list[FilledRow]) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(table, filled))))
    assert len(lines) == 3 * 6
    gqa = next(line for line in lines if line["method"] == "VisionZip" and line["benchmark"] == "gqa")
    assert (gqa["paper"], float(gqa["ours"]), gqa["paired"], gqa["command"]) == ("60", 40.0, "True", "python eval.py c")
    prefill = next(line for line in lines if line["method"] == "VisionZip" and line["benchmark"] == "prefill")
    assert prefill["command"] == "python -m vzip bench model=m budget=x" and prefill["machine"] == "H200, batches of 1"
    assert prefill["record"].endswith("bench/m/z/bench.json")
    assert gqa["record"].endswith("ours/x-y/seed0/run.json") and gqa["mismatch"] and gqa["source"]
    assert float(gqa["agreement"]) == pytest.approx(0.6) and float(gqa["p_value"]) < 1e-5
    rival = next(line for line in lines if line["method"] == "Rival")
    assert (rival["reason"], rival["command"], rival["ours"]) == ("not built", "", "")


def test_a_pruner_is_measured_with_the_rows_own_settings(table: PaperTable, tmp_path: Path) -> None:
    words = ("model=m", "methods=vanilla,fastv", "pruner.K=2", "pruner.keep=30")
    row = replace(table.rows[1], run=("r",), none=None, bench=words)
    of_rival = replace(table, rows=(table.rows[0], row, table.rows[2]))

    def prefill() -> Any:
        return [line.cells[4] for line in fill(of_rival, {}, find_benches(tmp_path / "runs"))[1:]]

    put_bench(tmp_path, "a", {"vanilla": (576, 30.0), "fastv": (576, 15.0)}, pruner={"K": 2, "keep": 60})
    assert [cell.ours for cell in prefill()] == [None, None], "of other settings"
    put_bench(tmp_path, "b", {"vanilla": (576, 30.0), "fastv": (576, 10.0)}, pruner={"K": 2, "keep": 30})
    rival, ours = prefill()
    assert (rival.ours, rival.ratio, ours.ours) == (10, 3, None)
    assert rival.command == ("python", "-m", "vzip", "bench", *words)
