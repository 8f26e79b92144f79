"""A leaderboard's numbers, its folder and what may be merged into it, from runs that are written by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vzip.analysis.plots import Timed, pareto_front
from vzip.errors import ManifestError
from vzip.report import leaderboard as report
from vzip.report.leaderboard_folder import Entry, merge, read_folder
from vzip.results.record import Run, read_record

DRAW = random.Random(5)
VANILLA = [float(DRAW.random() < 0.9) for _ in range(200)]
GOOD = [v if DRAW.random() < 0.97 else 0.0 for v in VANILLA]
CLOSE = [0.0 if i == GOOD.index(1.0) else v for i, v in enumerate(GOOD)]  # one question less
BAD = [v if DRAW.random() < 0.5 else 0.0 for v in VANILLA]


def run(folder: Path, scores: list[float], tokens: int, **change: Any) -> Run:
    """Writes a record and its answers."""
    folder.mkdir(parents=True)
    record = {
        "schema_version": 1,
        "model": {"name_or_path": "m", "weights_sha256": "w", "class": "C", "dtype": "float32", "preprocess": "llava"},
        "compressor": {"name": "Identity" if tokens == 576 else "X"},
        "visual_tokens": {"measured_min": tokens, "measured_max": tokens},
        "tasks": {
            "gqa": {
                "primary_metric": "exact_match",
                "unit": "fraction",
                "num_samples": len(scores),
                "metrics": {"exact_match": {"value": float(np.mean(scores)), "standard_error": 0.05}},
            }
        },
        "data": {"gqa": {"revision": "r", "questions_sha256": "q"}},
        "seed": 0,
        "limit": None,
        "provisional": False,
        "provisional_reasons": [],
    } | change
    (folder / "run.json").write_text(json.dumps(record))
    rows = [
        {"task": "gqa", "doc_id": i, "question": "?", "target": "a", "answer": str(s), "scores": {"exact_match": s}}
        for i, s in enumerate(scores)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(folder / "run.json", read_record(folder))


def cost(ms: float) -> dict[str, Any]:
    return {"median_ms": {"selection": 1.0, "prefill": ms - 5, "time_to_first_token": ms}, "kv_cache_bytes": 2**20}


def entries(folder: Path, methods: dict[str, list[float]], machine: str = "here", **change: Any) -> list[Entry]:
    found = [Entry("vanilla", "full", run(folder / "vanilla", VANILLA, 576, **change), cost(50), machine)]
    for number, (name, scores) in enumerate(methods.items()):
        found.append(Entry(name, "64tok", run(folder / name, scores, 64, **change), cost(20 + number), machine))
    return found


def write(folder: Path, found: list[Entry], missing: list[tuple[str, str, str]] = []) -> str:  # noqa: B006
    lines, pairs = report.compare(found)
    layout = report.lay_out(lines, pairs, missing, [])
    report.write(folder, lines, pairs, missing, layout, ("random",), "python -m vzip leaderboard")
    return (folder / "leaderboard.md").read_text()


def test_ranks_say_what_the_noise_leaves_open(tmp_path: Path) -> None:
    lines, pairs = report.compare(entries(tmp_path, {"random": BAD, "close": CLOSE, "good": GOOD}))
    vanilla, first, second, last = lines
    assert (vanilla.retention, vanilla.rank) == (100, 0)
    assert first.retention == pytest.approx(100 * np.mean(GOOD) / np.mean(VANILLA))
    assert [(line.entry.method, line.rank, line.best, line.worst) for line in (first, second, last)] == [
        ("good", 1, 1, 2),
        ("close", 2, 1, 2),
        ("random", 3, 3, 3),
    ]
    assert [(pair.a, pair.b, pair.outside_noise) for pair in pairs] == [
        ("good", "close", False),
        ("good", "random", True),
        ("close", "random", True),
    ]


def test_the_folder_holds_all_and_what_is_not_possible_is_said(tmp_path: Path) -> None:
    text = write(tmp_path / "out", entries(tmp_path, {"random": BAD, "good": GOOD}), [("fastv", "64tok", "too small")])
    assert "| fastv | 64 |  |  | not possible |" in text and "- fastv at 64: too small" in text
    assert "64tok: 1 of 1 differences are outside the noise; above random beyond it: good" in text
    assert "![retention against time](pareto.svg)" in text
    for name in ("pareto.svg", "pareto.png", "runs/good-64tok/run.json", "runs/good-64tok/samples.jsonl"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    table = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert table["not_possible"] == [{"method": "fastv", "budget": "64tok", "reason": "too small"}]
    assert [row["rank"] for row in table["entries"]] == [None, 1, 2]


def test_a_colleagues_folder_is_merged_and_doubles_are_said(tmp_path: Path) -> None:
    write(tmp_path / "theirs", entries(tmp_path / "a", {"random": BAD, "close": CLOSE}, "there", wall_time_s=2))
    ours = entries(tmp_path / "b", {"random": BAD, "good": GOOD})
    merged, said = merge(ours, [tmp_path / "theirs"])
    assert said == [f"random at 64tok is in {tmp_path / 'theirs'} too, with the same scores: our own is shown"]
    text = write(tmp_path / "both", merged)
    assert "close (theirs)" in text and "vanilla (theirs)" in text and "†: measured on there" in text
    again = read_folder(tmp_path / "both")  # what was merged goes on
    assert {(e.method, e.origin) for e in again if e.origin} == {("close", "theirs"), ("vanilla", "theirs")}
    points, vanilla_ms = report.timed(report.compare(merged)[0], ("random",))
    assert [p.method for p in points] == ["good", "random"] and vanilla_ms == 50


def test_folders_of_one_name_do_not_mix_and_the_same_runs_are_taken_once(tmp_path: Path) -> None:
    """Every leaderboard's folder has the same name where nobody gives another."""
    for number, scores in ((1, CLOSE), (2, GOOD)):
        wider = {"visual_tokens": {"measured_min": 576, "measured_max": 576}, "seed": 0, "wall_time_s": number}
        found = entries(tmp_path / f"runs{number}", {f"m{number}": scores}, "there", **wider)
        write(tmp_path / str(number) / "scenes", found)
    ours = entries(tmp_path / "own", {"random": BAD})
    merged, said = merge(ours, [tmp_path / "1" / "scenes", tmp_path / "2" / "scenes", tmp_path / "1" / "scenes"])
    assert [e.name for e in merged[2:]] == ["vanilla (scenes)", "m1 (scenes)", "vanilla (scenes-2)", "m2 (scenes-2)"]
    assert len({e.folder for e in merged}) == len(merged) and len(said) == 1, "m1 is told to be there already"
    write(tmp_path / "both", merged)
    (tmp_path / "both").rename(tmp_path / "moved")
    again = read_folder(tmp_path / "moved")
    assert sorted(e.run.record["wall_time_s"] for e in again if e.origin) == [1, 1, 2, 2]
    taken, said = merge(ours, [tmp_path / "moved"])
    assert {e.name for e in taken} == {e.name for e in merged}, "our own vanilla run comes back as ours"


def test_few_questions_leave_nothing_outside_the_noise(tmp_path: Path) -> None:
    """Of one question, or of two that all differ, no bootstrap draw differs from another."""
    for number in (1, 2):
        own = [Entry("vanilla", "full", run(tmp_path / f"v{number}", [1.0] * number, 576), None, "here")]
        own += [
            Entry(name, "64tok", run(tmp_path / f"{name}{number}", [score] * number, 64), None, "here")
            for name, score in (("good", 1.0), ("same", 1.0), ("bad", 0.0))
        ]
        lines, pairs = report.compare(own)
        assert not any(pair.outside_noise for pair in pairs)
        assert [(line.rank, line.best, line.worst) for line in lines[1:]] == [(1, 1, 3), (1, 1, 3), (3, 1, 3)]
        assert next(pair for pair in pairs if {pair.a, pair.b} == {"good", "same"}).p_value == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 20}, "limit is 20, ours None"),
        ({"model": {"name_or_path": "m", "weights_sha256": "x"}}, "model.weights_sha256 is 'x', ours 'w'"),
        ({"data": {"gqa": {"revision": "s", "questions_sha256": "q"}}}, "data of gqa: revision is 's', ours 'r'"),
        ({"gen_kwargs": {"num_beams": 2}}, "gen_kwargs is {'num_beams': 2}, ours None"),
    ],
)
def test_another_model_protocol_or_data_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path / "theirs", entries(tmp_path / "a", {"random": BAD}, **change))
    with pytest.raises(ManifestError, match="cannot be merged") as error:
        merge(entries(tmp_path / "b", {"random": BAD}), [tmp_path / "theirs"])
    assert message in str(error.value)


def test_what_is_no_leaderboard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"holds no leaderboard\.json"):
        read_folder(tmp_path)
    (tmp_path / "leaderboard.json").write_text(
        json.dumps({"kind": "leaderboard", "schema_version": 1, "entries": [{"run": "../elsewhere"}]})
    )
    with pytest.raises(ManifestError, match="lies outside"):
        read_folder(tmp_path)
    for text, message in (
        ("{", "cannot be used"),
        ('{"kind": "leaderboard", "schema_version": 1, "entries": []}', "no vanilla run"),
        ('{"kind": "leaderboard", "schema_version": 1, "entries": [{"run": "runs/gone"}]}', r"gone"),
    ):
        (tmp_path / "leaderboard.json").write_text(text)
        with pytest.raises(ManifestError, match=message):
            read_folder(tmp_path)


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [Timed(name, "64", ms, kept, kept, kept) for name, ms, kept in (("a", 2, 90), ("b", 1, 80), ("c", 3, 85))]
    assert [point.method for point in pareto_front(points)] == ["b", "a"]
