"""The summary of a sweep: scores, retention against its own vanilla run, and the points of its plot."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vzip.results.record import Run, read_record
from vzip.results.stats import retention_interval
from vzip.results.sweep_summary import Job, average_score, lay_out_sweep, plot_points, summarise, write_summary

DRAW = random.Random(3)
TASKS = ("gqa", "vqa")
VANILLA = {task: [float(DRAW.random() < 0.8) for _ in range(60)] for task in TASKS}
COMPRESSED = {task: [v if DRAW.random() < 0.8 else 0.0 for v in VANILLA[task]] for task in TASKS}


def put(folder: Path, method: str, scores: dict[str, list[float]], tokens: int, **change: Any) -> Run:
    """Writes a run: its record and its answers."""
    folder.mkdir(parents=True)
    record = {
        "schema_version": 1,
        "model": {"name_or_path": "m"},
        "compressor": {"name": method, "settings": method},
        "visual_tokens": {"measured_min": tokens, "measured_max": tokens},
        "tasks": {
            task: {
                "primary_metric": "exact_match",
                "unit": "fraction",
                "num_samples": len(values),
                "metrics": {"exact_match": {"value": float(np.mean(values)), "standard_error": 0.05}},
            }
            for task, values in scores.items()
        },
        "data": {task: {"questions_sha256": task} for task in scores},
        "wall_time_s": 12.0,
        "provisional": False,
        "provisional_reasons": [],
    } | change
    (folder / "run.json").write_text(json.dumps(record))
    rows = [
        {"task": task, "doc_id": i, "question": "?", "target": "a", "answer": str(s), "scores": {"exact_match": s}}
        for task, values in scores.items()
        for i, s in enumerate(values)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(folder / "run.json", read_record(folder))


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    full = put(tmp_path / "full", "Identity", VANILLA, 576)
    ours = put(tmp_path / "ours", "VisionZip", COMPRESSED, 64)
    other = put(tmp_path / "other", "VisionZip", COMPRESSED, 64, model={"name_or_path": "n"}, provisional=True)
    return [
        Job(0, ("budget=full",), full),
        Job(1, ("budget=64tok", "compressor=visionzip"), ours),
        Job(2, ("budget=64tok", "model=n"), other),
        Job(3, ("budget=9tok",), None, "ConfigError: too few"),
    ]


def test_retention_is_that_of_the_paired_bootstrap(jobs: list[Job]) -> None:
    full, ours, other = summarise(jobs)
    pairs = {task: (np.array(COMPRESSED[task]), np.array(VANILLA[task])) for task in TASKS}
    point, low, high = retention_interval(pairs)
    assert (ours.retention, ours.low, ours.high) == pytest.approx((100 * point, 100 * low, 100 * high))
    by_hand = np.mean([np.mean(COMPRESSED[task]) / np.mean(VANILLA[task]) for task in TASKS])
    assert ours.retention == pytest.approx(100 * by_hand) and ours.low is not None
    assert ours.low < ours.retention < 100
    assert full.retention == 100
    assert ours.average == pytest.approx(50 * sum(np.mean(COMPRESSED[task]) for task in TASKS))
    assert other.retention is None and other.remark == "no vanilla run of its model and questions under the runs folder"


def test_the_plot_has_a_point_for_each_compressed_run_with_a_retention(jobs: list[Job]) -> None:
    lines = summarise(jobs)
    (point,) = plot_points(lines)
    assert (point.method, point.num_tokens) == ("compressor=visionzip", 64)
    assert (point.retention, point.low, point.high) == (lines[1].retention, lines[1].low, lines[1].high)
    assert Job(0, ("budget=64tok",), jobs[1].run).method == "VisionZip"


def test_what_is_written(jobs: list[Job], tmp_path: Path) -> None:
    lines = summarise(jobs)
    assert write_summary(jobs, lines, tmp_path) == ["summary.md", "summary.csv", "retention.png"]
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [(row["job"], row["task"]) for row in rows] == [
        *((str(number), task) for number in range(3) for task in TASKS),
        ("3", ""),
    ]
    assert float(rows[3]["score"]) == np.mean(COMPRESSED["vqa"]) and rows[3]["retention_percent"] == str(
        lines[1].retention
    )
    assert rows[-1]["error"] == "ConfigError: too few"
    assert Image.open(tmp_path / "retention.png").width > 500
    text = (tmp_path / "summary.md").read_text()
    assert "no retention of jobs 2: no vanilla run" in text and "*: provisional" in text
    assert "| 3 | budget=9tok | failed |" in text
    assert write_summary(jobs[2:], lines[2:], tmp_path) == ["summary.md", "summary.csv"]


def test_other_questions_give_no_retention(jobs: list[Job], tmp_path: Path) -> None:
    fewer = put(tmp_path / "fewer", "VisionZip", {"gqa": COMPRESSED["gqa"][:9]}, 64)
    line = summarise([jobs[0], Job(9, (), fewer)])[1]
    assert line.retention is None and "51 questions stand in one run only" in str(line.remark)
    (row,) = [row for row in lay_out_sweep([Job(9, (), fewer)], [line]).blocks[0]]
    assert [piece.text for piece in row][2:4] == ["64", f"{np.mean(COMPRESSED['gqa'][:9]):.4g}"]


def record(**tasks: tuple[float, str | None]) -> dict[str, Any]:
    return {
        "tasks": {
            name: {
                "primary_metric": "m",
                "unit": unit,
                "num_samples": 1,
                "metrics": {"m": {"value": value, "standard_error": None}},
            }
            for name, (value, unit) in tasks.items()
        }
    }


def test_the_objective_is_one_number_of_one_unit() -> None:
    assert average_score(record(a=(0.5, "fraction"), b=(70.0, "percent"))) == 60.0
    assert average_score(record(a=(1500.0, "points"), b=(1000.0, "points"))) == 1250.0
    assert average_score(record(a=(0.5, "fraction"), b=(1500.0, "points"))) is None
    assert average_score(record(a=(0.25, None), b=(0.75, None))) == 0.5
    assert average_score(record()) is None


def test_a_vanilla_run_elsewhere_under_the_runs_folder_is_found(tmp_path: Path) -> None:
    put(tmp_path / "runs" / "deep" / "er" / "than" / "the" / "usual" / "tree", "Identity", VANILLA, 576)
    ours = put(tmp_path / "runs" / "scenes" / "m" / "visionzip-64tok" / "seed0", "VisionZip", COMPRESSED, 64)
    (line,) = summarise([Job(0, ("budget=64tok",), ours)])
    assert line.retention is not None and line.retention < 100 and line.remark is None


@pytest.mark.parametrize(
    ("unit", "words"), [("fraction", "in percent"), ("points", "in points"), (None, "in the benchmarks' own unit")]
)
def test_an_average_is_in_the_unit_it_says(unit: str | None, words: str, tmp_path: Path) -> None:
    run = put(tmp_path / "a", "VisionZip", COMPRESSED, 64)
    record = {**run.record, "tasks": {name: {**task, "unit": unit} for name, task in run.record["tasks"].items()}}
    jobs = [Job(0, ("budget=64tok",), Run(run.path, record))]
    lines = summarise(jobs)
    mean = np.mean([np.mean(values) for values in COMPRESSED.values()])
    assert lines[0].average == pytest.approx(mean * (100 if unit == "fraction" else 1))
    assert f"average: {words}" in lay_out_sweep(jobs, lines).remarks[0]


def test_a_limited_run_is_marked_wherever_it_has_a_number(tmp_path: Path) -> None:
    full = put(tmp_path / "full", "Identity", VANILLA, 576, provisional=True)
    jobs = [
        Job(0, ("budget=full",), full),
        Job(1, (), put(tmp_path / "o", "VisionZip", COMPRESSED, 64, provisional=True)),
    ]
    lines = summarise(jobs)
    cells = [piece.text for piece in lay_out_sweep(jobs, lines).blocks[0][1]]
    assert sum(cell.endswith("*") for cell in cells) == len(TASKS) + 2, "each score, the average and retention"
    assert [point.provisional for point in plot_points(lines)] == [True]
