"""The paper's tables: complete, consistent with themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vzip.errors import ConfigError, ManifestError
from vzip.evaluation.benchmarks.protocols import PROTOCOLS
from vzip.installed import checkout
from vzip.option_files import read_yaml
from vzip.pruners import FastV
from vzip.report.paper_tables import AVERAGE, PaperTable, Row
from vzip.report.table_files import read_table, row_of_recipe, table_names
from vzip.results.record import unit_factor

PAPER = [name for name in table_names() if name.isdigit()]
TABLES = [read_table(name) for name in PAPER]


def half_digit(value: float) -> float:
    """The largest rounding error of a printed number: MME is printed whole, everything else with one digit."""
    return 0.5 if value > 200 and value == int(value) else 0.05


def rounding(table: PaperTable, row: Row) -> float:
    """How far rounding alone can take the printed average from the recomputed one, in percent."""
    assert row.base is not None
    base, worst = table.row(row.base), 0.0
    for key in table.average_over:
        value, vanilla = row.values[key], base.values[key]
        worst += value / vanilla * (half_digit(value) / value + half_digit(vanilla) / vanilla)
    return 0.05 + 100 * worst / len(table.average_over)


def test_which_tables_there_are() -> None:
    assert [str(n) for n in (*range(1, 8), *range(10, 19))] == PAPER
    assert table_names()[len(PAPER) :] == ["scenes", "scenes5"]
    # Counted in the paper's tables: rows x columns, less the numbers it does not give.
    counts = {table.name: sum(cell.value is not None for cell in table.cells()) for table in TABLES}
    assert counts["1"] == 13 * 11 and counts["2"] == 10 * 7 and counts["3"] == 4 * 4 and counts["4"] == 4 * 2
    assert counts["5"] == 3 and counts["6"] == 4 * 2 and counts["7"] == 3 * 2 and counts["10"] == 7 * 11
    assert counts["11"] == 4 * 12 and counts["12"] == 7 * 9 and counts["13"] == 7 * 9 and counts["14"] == 7 * 9
    assert counts["15"] == 7 * 7 and counts["16"] == 4 * 10 - 1 and counts["17"] == 3 * 9 + 2 * 2
    assert counts["18"] == 5 * 2


@pytest.mark.parametrize("table", TABLES, ids=PAPER)
def test_every_cell_has_a_source_and_a_run_or_a_reason(table: PaperTable) -> None:
    for cell in table.cells():
        assert cell.source.startswith(f"arXiv 2412.04467, Table {table.name}, row ")
        assert bool(cell.command) != bool(cell.reason), cell
        if cell.method in ("FastV", "SparseVLM"):
            assert cell.command, "rivals that are here have a recipe"


def test_rivals_recipes_are_of_their_row() -> None:
    """Each evaluates the table's own model with the row's method, and its numbers are where `compare` looks."""
    families = {"1": "llava15_7b", "2": "llava_next_7b", "3": "video_llava_7b", "4": "llava_next_7b"}
    methods = {"FastV": ("fastv",), "SparseVLM": ("sparsevlm_v10",)}
    found = 0
    for table in (table for table in TABLES if table.name in families):
        for row in (row for row in table.rows if row.method in methods):
            (word,) = row.run
            recipe = word.removeprefix("+exp=")
            config = read_yaml((checkout() / "configs" / "exp" / f"{recipe}.yaml").read_text())
            overrides = {k: v for entry in config["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
            assert config["recipe"] == recipe
            assert overrides["override /model"] == families[table.name]
            assert overrides["override /pruner"] in methods[row.method]
            of = row_of_recipe(recipe, PAPER)
            assert table.name == "4" or (of is not None and of == (table, row))
            found += 1
    assert found == 6 + 3 + 2 + 2


@pytest.mark.parametrize(
    ("table", "label", "num_visual", "average"),
    [
        ("1", "192, FastV", 576, 192),
        ("1", "64, FastV", 576, 64),
        ("3", "135, FastV", 2056, 135),
        ("4", "160, FastV", 2880, 330),
    ],
)
def test_fastv_recipes_are_their_budget_on_average(table: str, label: str, num_visual: int, average: int) -> None:
    (word,) = read_table(table).row(label).run
    config = read_yaml((checkout() / "configs" / "exp" / f"{word.removeprefix('+exp=')}.yaml").read_text())
    assert FastV(**config["pruner"]).average(num_visual, 32) == pytest.approx(average, abs=0.5)


@pytest.mark.parametrize("table", TABLES, ids=PAPER)
def test_printed_averages_follow_the_rule_or_are_marked(table: PaperTable) -> None:
    for row in table.rows:
        average = table.average(row)
        if average is None or row.average is None:
            assert not table.average_over, row
            continue
        mark = table.mismatch(row, AVERAGE)
        apart = abs(average - row.average) > rounding(table, row)
        assert apart == (mark is not None and mark.recomputed is not None), (row.label, average, row.average)
        if mark is not None and mark.recomputed is not None:
            assert average == pytest.approx(mark.recomputed, abs=0.051)


@pytest.mark.parametrize("table", TABLES, ids=PAPER)
def test_printed_ratios(table: PaperTable) -> None:
    for row in table.rows:
        for key, printed in row.printed_ratio.items():
            column = table.column(key)
            ratio = table.ratio(row, column)
            assert ratio is not None
            assert ratio * (1 if column.is_cost else 100) == pytest.approx(printed, abs=0.051), (row.label, key)


def test_one_run_has_one_number_wherever_it_is_printed_or_the_difference_is_marked() -> None:
    seen: dict[tuple[str, ...], tuple[PaperTable, Row, float]] = {}
    compared = 0
    for table in TABLES:
        for cell in table.cells():
            if not cell.command or cell.value is None:
                continue
            row = table.row(f"{cell.tokens}, {cell.method}")
            # One measurement of the bench holds vanilla and VisionZip.
            key = (*cell.command, cell.benchmark, str(cell.method.startswith("vanilla")))
            first = seen.setdefault(key, (table, row, cell.value))
            compared += first[0] is not table
            if first[2] != cell.value:
                marks = (table.mismatch(row, cell.benchmark), first[0].mismatch(first[1], cell.benchmark))
                assert any(m is not None and m.elsewhere is not None for m in marks), (cell, first[2])
    assert compared > 60


def test_marks_between_tables_are_true() -> None:
    found = 0
    for table in TABLES:
        for mark in table.mismatches:
            if mark.elsewhere is not None:
                name, label, column = mark.elsewhere
                here, there = table.row(mark.row).values[mark.column], read_table(name).row(label).values[column]
                assert here != there and f"{here:g}" in mark.note and f"{there:g}" in mark.note
                found += 1
    assert found == 9


@pytest.mark.parametrize("name", table_names())
def test_metrics_are_those_of_the_protocol(name: str) -> None:
    for column in read_table(name).columns:
        if column.task is None or column.metric is None:
            continue
        protocol = PROTOCOLS[column.task]
        unit_factor(protocol.unit, column.unit, column.key)
        assert column.metric in (protocol.primary, "seed_image")


ROW = {"tokens": 4, "method": "vanilla", "run": "a", "values": [1]}


def own(**change: object) -> str:
    content = {"name": "x", "title": "t", "source": "s", "columns": ["gqa"], "average_over": ["gqa"]}
    return json.dumps(content | {"rows": [ROW]} | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[]", "is not a table"),
        (own(columns=["gqe"]), r"column 'gqe' is not known \(did you mean 'gqa'\?\)"),
        (own(average_over=["pope"]), "average_over names 'pope'"),
        (own(rows=[ROW, ROW]), "row '4, vanilla' is named and must stand there exactly once"),
        (own(base="5, vanilla"), "row '5, vanilla' is named"),
        (own(rows=[{"tokens": 4, "method": "vanilla"}]), "either run .* or none"),
        (own(rows=[{"tokens": 4, "method": "vanilla", "run": "a", "values": [1, 2]}]), "2 numbers for 1 columns"),
        (own(rows=[{"method": "vanilla"}]), "KeyError 'tokens'"),
        (own(columns=["gqa", "gqa"]), "column 'gqa' stands there twice"),
        (own(own_columns={"gqa": {"title": "G", "unit": "%"}}), "column 'gqa': unit is '%', must be one of percent"),
        (own(own_columns={"gqa": {"title": "G"}}), "missing 1 required positional argument: 'unit'"),
        (own(rows=[ROW | {"values": ["55"]}]), "row '4, vanilla': gqa is '55', must be a number or null"),
        (own(rows=[ROW | {"tolerance": [-1]}]), "tolerance has -1, must be 0 or more"),
        (own(rows=[ROW | {"tolerence": [1]}]), r"'tolerence' is no key of a row \(did you mean 'tolerance'\?\)"),
    ],
)
def test_bad_tables(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ManifestError, match=message):
        read_table(str(tmp_path / "mine.json"))


def test_an_unknown_table_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"table 'scene': no such table .did you mean 'scenes'.*1, 2, 3.*scenes"):
        read_table("scene")
    with pytest.raises(ConfigError, match="no such table"):
        read_table("columns")
