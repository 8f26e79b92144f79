"""Records listed, and any two of them held against each other."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.records import COMPRESSED, VANILLA, put, record, run_main

from vzip.cli import main
from vzip.errors import ConfigError, ManifestError
from vzip.report.two_runs import compare_runs, differing_settings, lay_out_pair
from vzip.results.layout import print_layout, to_markdown
from vzip.results.record import Run, find_runs
from vzip.results.stats import mcnemar_p


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Run, Run]:
    vanilla = put(tmp_path, "vanilla", record("Identity", (0.8, 1.7)), VANILLA)
    limited = {"provisional": True, "provisional_reasons": ["limit=5"], "created": "2026-02-03T01:02:03"}
    return put(tmp_path, "ours", record(scores=(0.4, 0.7), batch_size=4, **limited), COMPRESSED), vanilla


def test_two_runs_on_the_same_questions(pair: tuple[Run, Run]) -> None:
    gqa, total, first, second = compare_runs(*pair)
    assert [(p.task, p.metric) for p in (gqa, total, first, second)] == [
        ("gqa", "exact_match"),
        ("mme", "p+c"),
        ("mme", "p"),
        ("mme", "c"),
    ]
    assert (gqa.ours.value, gqa.other.value) == (0.4, 0.8) and gqa.unpaired_because is None
    assert gqa.paired is not None and gqa.paired.is_paired and gqa.paired.outside_noise
    assert (gqa.paired.num_lost, gqa.paired.num_gained, gqa.paired.p_value) == (20, 0, mcnemar_p(20, 0))
    assert gqa.paired.agreement == pytest.approx(0.6) and gqa.paired.retention == pytest.approx(0.5)
    turned = compare_runs(*pair[::-1])[0]
    assert turned.paired is not None and turned.paired.retention == pytest.approx(2)


def test_other_questions_are_compared_unpaired_and_it_is_said(pair: tuple[Run, Run], tmp_path: Path) -> None:
    fewer = put(tmp_path, "fewer", record("Identity", (0.75, 1.7)), VANILLA[:20])
    found = compare_runs(pair[0], fewer)[0]
    assert found.unpaired_because is not None and "30 questions stand in one run only" in found.unpaired_because
    assert found.paired is not None and not found.paired.is_paired and found.paired.p_value is None
    text = to_markdown(lay_out_pair(pair[0], fewer))
    assert " ~ |" in text and "30 questions stand in one run only" in text


def test_nothing_in_common(pair: tuple[Run, Run]) -> None:
    other = Run(pair[1].path, {**pair[1].record, "tasks": {"pope": pair[1].record["tasks"]["gqa"]}})
    with pytest.raises(ManifestError, match=r"has the tasks gqa, mme, .* has pope: no metric stands in both"):
        compare_runs(pair[0], other)


def test_settings_that_differ() -> None:
    ours = record(config={"model": {"dtype": "float16"}, "eval": {"limit": 5}}, versions={"torch": "1"})
    other = record("Identity", config={"model": {"dtype": "float32"}}, versions={"torch": "1"})
    assert differing_settings(ours, other) == [
        ("config.model.dtype", "float16", "float32"),
        ("config.eval.limit", 5, None),
        ("compressor.name", "VisionZip", "Identity"),
        ("compressor.settings", "VisionZip", "Identity"),
    ]
    assert differing_settings(ours, ours) == []


def test_another_pillow_is_said(pair: tuple[Run, Run]) -> None:
    def compared(ours: str | None, other: str | None) -> str:
        runs = [
            Run(run.path, {**run.record, "versions": {"pillow": version}})
            for run, version in zip(pair, (ours, other), strict=True)
        ]
        return to_markdown(lay_out_pair(*runs))

    assert "A and B: images resized by Pillow 13.0.0 and 12.3.0;" in compared("13.0.0", "12.3.0")
    assert "Pillow 13.0.0 and an unrecorded version" in compared("13.0.0", None)
    assert "resized by" not in compared("13.0.0", "13.0.0")


def test_the_command(pair: tuple[Run, Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(pair[0].path.parent, pair[1].path) == 0
    out = capsys.readouterr().out
    for text in ("0.4", "0.8", "-0.4", "50.0", "60.0", "A is provisional: limit=5", "batch_size: 4 | -"):
        assert text in out, text
    console = Console(width=300, record=True, file=io.StringIO())
    print_layout(lay_out_pair(*pair), console)
    assert "\x1b[1m" in next(line for line in console.export_text(styles=True).splitlines() if "exact_match" in line)
    print_layout(lay_out_pair(pair[0], pair[0]), console)
    shown = console.export_text()
    assert "all settings are the same" in shown and "100.0 to 100.0" in shown


def listed(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    assert main(["runs", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed(pair: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    vanilla, ours = listed(capsys, folder)
    assert ours["run"] == "eval/ours/x-y/seed0" and ours["recipe"] == "mine" and ours["visual_tokens"] == [64, 64]
    assert ours["tasks"]["gqa"] == {
        "metric": "exact_match",
        "value": 0.4,
        "standard_error": 0.01,
        "unit": "fraction",
        "num_samples": 50,
    }
    assert ours["tasks"]["mme"]["metric"] == "p+c" and ours["tasks"]["mme"]["value"] == pytest.approx(100)
    assert ours["provisional"] and not vanilla["provisional"] and ours["date"] == "2026-02-03T01:02:03"
    assert [entry["compressor"] for entry in listed(capsys, folder, "identity", "GQA")] == ["Identity"]
    assert listed(capsys, folder, "identity", "ours") == []
    assert main(["runs", str(folder)]) == 0
    out = capsys.readouterr().out
    for text in ("runs: 2", "0.4*", "0.8 ", "2026-02-03", "eval/vanilla/x-y/seed0", "*: provisional"):
        assert text in out, text
    assert main(["runs", str(folder), "nobody"]) == 0 and "no record in" in capsys.readouterr().out


def test_what_cannot_be_read_is_named(
    pair: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair[1].path.write_text("{")
    assert main(["runs", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert ":1\n" in shown.out.replace(" ", "") and f"not read: {pair[1].path} is not JSON" in shown.err
    assert [run.path for run in find_runs(tmp_path)] == [pair[0].path]
    monkeypatch.chdir(tmp_path / "runs")
    assert main(["runs", "gqa"]) == 2 and "runs: no such folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leave out --expected"):
        run_main(pair[0].path, pair[0].path, "--expected", "x")
    with pytest.raises(ManifestError, match="x"):
        run_main(pair[0].path, pair[0].path, "--vanilla", "x")
