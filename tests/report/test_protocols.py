"""Other sources' published numbers: held to their form, to spot values, and apart from each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vzip.errors import ConfigError, ManifestError
from vzip.evaluation.benchmarks.protocols import PROTOCOLS
from vzip.report.protocols import (
    OPTIONS,
    PROTOCOLS_FOLDER,
    Protocol,
    lay_out_published,
    our_scores,
    parse_protocol,
    protocol_names,
    read_protocol,
)
from vzip.report.table_files import table_names
from vzip.results.layout import Layout
from vzip.results.record import Run, unit_factor


def value(name: str, model: str, tokens: int | str, method: str, column: str) -> float | None:
    found = [
        row.values[column]
        for table in read_protocol(name).tables
        for row in table.rows
        if table.model == model and (row.tokens, row.method) == (tokens, method) and column in row.values
    ]
    assert len(found) <= 1
    return found[0] if found else None


def test_which_there_are() -> None:
    assert protocol_names()[:5] == ["A", "B", "C", "D", "E"]
    assert {"flowcut", "provip", "std", "vscan", "sparsevlm", "scope"} <= set(protocol_names())
    assert not set(protocol_names()) & set(table_names()), "no protocol is a table of the paper"


@pytest.mark.parametrize("name", protocol_names())
def test_every_source_is_whole(name: str) -> None:
    protocol = read_protocol(name)
    assert protocol.source and protocol.title and all(protocol.asked.values())
    for table in protocol.tables:
        for row in table.rows:
            assert row.values, (table.model, row)
            for key, number in row.values.items():
                points = next(c for c in table.columns if c.key == key).unit == "points"
                assert 500 < number < 2800 if points else 0 < number < 101, (table.model, row)
            assert isinstance(row.tokens, str) or table.of is None or row.tokens < table.of
        for column in table.columns:
            if column.task is not None and column.metric is not None:
                unit_factor(PROTOCOLS[column.task].unit, column.unit, column.key)


@pytest.mark.parametrize(
    ("name", "model", "tokens", "method", "column", "expected"),
    [
        ("A", "LLaVA-1.5-7B", 64, "MMTok", "pope", 85.77),
        ("A", "LLaVA-1.5-7B", 192, "VisionZip", "mme", 1782.6),
        ("A", "LLaVA-1.5-7B", 64, "VisionZip", "average", 93.2),
        ("A", "Qwen2.5-VL-7B, any resolution", "10 %", "VisionZip", "ocrbench", 36.9),
        ("B", "LLaVA-1.5-7B", 64, "DivPrune + Cen", "average", 96.2),
        ("B", "LLaVA-1.5-7B", 64, "VisionZip", "mme_perception", 1370),
        ("B", "LLaVA-NeXT-7B", 320, "HoloV", "average", 92.2),
        ("B", "LLaVA-NeXT-7B", 640, "HoloV", "average", None),
        ("B", "LLaVA-1.5-7B", 32, "CDPruner", "average", None),
        ("C", "LLaVA-1.5-7B", 64, "SCOPE", "average", 96.0),
        ("C", "LLaVA-1.5-7B", 128, "SCOPE", "mme_perception", 1440.5),
        ("D", "LLaVA-NeXT-7B", 160, "EADP", "accuracy", 63.4),
        ("E", "LLaVA-1.5-7B", 64, "PyramidDrop", "average", 77.5),
        ("flowcut", "Video-LLaVA-7B", 256, "VisionZip", "average", 94.4),
        ("std", "LLaVA-1.5-7B", 64, "FlowCut", "average", 93.2),
        ("sparsevlm", "Video-LLaVA-7B", 194, "SparseVLM", "average", 95.0),
    ],
)
def test_spot_values(
    name: str, model: str, tokens: int | str, method: str, column: str, expected: float | None
) -> None:
    assert value(name, model, tokens, method, column) == expected


def test_what_is_second_hand_is_marked() -> None:
    assert read_protocol("A").is_second_hand("VisionZip") and not read_protocol("A").is_second_hand("MMTok")
    assert read_protocol("vscan").is_second_hand("VScan")
    (first, *_) = lay_out_published(read_protocol("A"), [])
    marked = {line[1].text for block in first.blocks for line in block if line[2].text == "second-hand"}
    assert marked == {"FastV", "SparseVLM", "VisionZip", "VisionZip++"}


def record(tmp_path: Path, **compressor: Any) -> Run:
    """A record of VisionZip's 64 tokens on LLaVA-1.5-7B."""
    metrics = {"mme_perception_score": 1402.04, "mme_cognition_score": 300.0}
    settings = {"merge_rule": "sum", "score": "attention", "score_layer": None, "targets": "uniform", "keep_cls": True}
    content = {
        "created": "2026-01-01",
        "provisional": False,
        "config": {
            "model": {"name": "llava15_7b", "projector": None},
            "compressor": {"name": "visionzip", **settings, **compressor},
            "pruner": {"name": "none"},
            "budget": {"num_dominant": 54, "num_contextual": 10},
        },
        "tasks": {
            "mme": {
                "unit": "points",
                "num_samples": 10,
                "primary_metric": "mme_perception_score",
                "metrics": {name: {"value": v, "standard_error": None} for name, v in metrics.items()},
            }
        },
    }
    return Run(tmp_path / "run.json", content)


def lines(layouts: list[Layout]) -> list[list[str]]:
    return [[piece.text for piece in line] for layout in layouts for block in layout.blocks for line in block]


def test_our_scores_stand_below_their_row_alone(tmp_path: Path) -> None:
    found = lines(lay_out_published(read_protocol("B"), [record(tmp_path)]))
    (ours,) = [number for number, line in enumerate(found) if line[3] == "ours"]
    assert found[ours - 1][:2] == ["64", "VisionZip"] and found[ours - 1][6] == "1370" and found[ours][6] == "1402"
    # Perception alone is not protocol A's sum, and other settings are another method.
    sums = read_protocol("A").tables[0]
    row = next(row for row in sums.rows if (row.tokens, row.method) == (64, "VisionZip"))
    assert our_scores(sums, row, [record(tmp_path)])["mme"] == pytest.approx(1702.0)
    assert our_scores(sums, row, [record(tmp_path, merge_rule="mean")]) == {}
    assert our_scores(sums, next(r for r in sums.rows if r.tokens == 128), [record(tmp_path)]) == {}


def test_names_are_of_methods_that_some_source_prints() -> None:
    printed = {row.method for name in protocol_names() for table in read_protocol(name).tables for row in table.rows}
    assert OPTIONS.keys() <= printed


def content(**change: Any) -> dict[str, Any]:
    return json.loads((PROTOCOLS_FOLDER / "E.json").read_text()) | change


def one_table(**change: Any) -> list[dict[str, Any]]:
    row = {"tokens": 64, "method": "HoloV", "values": [1.0]}
    return [{"model": "m", "option": None, "of": 576, "columns": ["average"], "rows": [row]} | change]


ROW = {"tokens": 64, "method": "HoloV", "values": [1.0]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (content(extra=1), "extra: a file must have"),
        (content(protocol={}), "its protocol prompt, ocr_candidates"),
        (content(name="F"), "name is 'F', must be the file's, 'E'"),
        (content(copied=["HoloX"]), r"copied names 'HoloX', .*did you mean 'HoloV'"),
        (content(tables=one_table(columns=["averag"])), r"column 'averag' is not known \(did you mean 'average'"),
        (content(tables=one_table(rows=[ROW, ROW])), "row 64, HoloV stands there twice"),
        (content(tables=one_table(rows=[ROW | {"values": [1, 2]}])), "2 numbers for 1 columns"),
        (content(tables=one_table(rows=[ROW | {"values": ["1"]}])), "average is '1', must be a number or null"),
    ],
)
def test_bad_files(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        parse_protocol(PROTOCOLS_FOLDER / "E.json", changed)


def test_an_unknown_one_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"--protocol scop: no such protocol .did you mean 'scope'"):
        read_protocol("scop")
    assert isinstance(read_protocol("scope"), Protocol)
