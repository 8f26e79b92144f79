"""What is said of curves: fits against numpy's, tables against numbers worked out by hand, the page by its record."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts.update_performance import FOLDER, PAGE, RECORD, SHOWN, part, put

from vzip.json_files import read_json
from vzip.report.curves import WORDS, flattens_at, growth, line, tables
from vzip.report.figures.curves import draw
from vzip.report.figures.drawing import write_drawing


def point(value: int, method: str, first_ms: float, batch: int = 1, tokens: int = 100) -> dict[str, Any]:
    def stage(median: float) -> dict[str, float]:
        return {"median_ms": median, "q1_ms": 0.9 * median, "q3_ms": 1.1 * median}

    def work(number: int) -> dict[str, int | None]:
        return {"counted": number, "formula": number}

    return {
        "value": value,
        "method": method,
        "stages": {
            "tower": stage(first_ms / 4),
            "prefill": stage(first_ms / 2),
            "decode_per_token": stage(first_ms / 20),
            "time_to_first_token": stage(first_ms),
        },
        "num_visual_tokens": tokens,
        "num_prompt_tokens": tokens + 60,
        "num_prompts": batch,
        "num_crops": 1,
        "kv_cache_bytes": 2**20 * batch * value,
        "peak_memory_added_bytes": 2**21,
        "flops": {
            "tower": work(10**9 * batch),
            "prefill": work(10**8 * value**2),
            "decode_per_token": {"counted": 10**6 * value, "formula": None},
        },
    }


def record() -> dict[str, Any]:
    """Time of a batch: 6 ms and 2 for each prompt; prefill's work grows with the square, its time with the value."""
    own = {axis: [point(n, "vzip", 4.0 * n) for n in (4, 1, 2)] for axis in WORDS}
    own["batch"] = [point(n, "vzip", 6 + 2.0 * n, n) for n in (1, 2, 4, 8, 16, 32, 64)]
    own["batch"] += [point(n, "vanilla", 8.0 * n, n) for n in (1, 2)]
    return {
        "model": "tiny",
        "methods": own,
        "settings": {"repeats": 3},
        "resolved": {"num_parameters": 4_500_000, "dtype": "float32", "device": "cpu"},
        "environment": {
            "code": {"commit": "0123456789abcdef"},
            "processor": "A processor",
            "num_threads": 2,
            "load_average_1min": 0.1,
            "torch": "2",
            "transformers": "5",
            "time": "2026-11-27T00:00:00",
            "command": "python -m vzip bench --curves",
        },
    }


def rows_of(table: str, title: str) -> list[list[str]]:
    lines = table.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in one.strip("|").split("|")] for one in lines]


def test_growth_is_the_slope_between_logarithms() -> None:
    rng = np.random.default_rng(0)
    values = np.array([1.0, 2, 4, 8, 16])
    costs = 3 * values**1.7 * rng.uniform(0.8, 1.2, 5)
    assert growth(values.tolist(), costs.tolist()) == pytest.approx(np.polyfit(np.log(values), np.log(costs), 1)[0])
    assert growth([1, 2, 4], [5, 10, 20]) == pytest.approx(1.0) and growth([3], [1]) is None


def test_a_line_has_the_least_relative_error_and_no_negative_beginning() -> None:
    rng = np.random.default_rng(1)
    values = np.array([1.0, 2, 4, 8, 64])
    times = (6 + 2 * values) * rng.uniform(0.95, 1.05, 5)
    slope, fixed = np.polyfit(values, times, 1, w=1 / times)
    own = line(values.tolist(), times.tolist())
    assert (own.fixed_ms, own.per_unit_ms) == pytest.approx((fixed, slope))
    assert line([1, 2, 4], [1, 4, 16]).fixed_ms == 0 and line([2], [8]).per_unit_ms == 4


def test_gains_flatten_where_a_prompt_takes_a_tenth_more_than_the_least() -> None:
    points = record()["methods"]["batch"][:7]
    per_prompt = {n: (6 + 2 * n) / n for n in (1, 2, 4, 8, 16, 32, 64)}
    expected = min(n for n, own in per_prompt.items() if own <= 1.1 * min(per_prompt.values()))
    assert flattens_at(points) == expected == 32


def test_the_tables_hold_the_numbers() -> None:
    shown = tables(record())
    head, _, *rows = rows_of(shown, "Prompts")
    last = dict(zip(head, rows[-1], strict=True))
    assert (last["prompts"], last["method"], last["first token ms"], last["a prompt"]) == ("64", "vzip", "134", "2.09")
    assert float(last["GFLOPs"].replace(",", "")) == pytest.approx(64 + 0.1 * 64**2, rel=1e-2)
    head, _, *rows = rows_of(shown, "Rates of growth")
    of_prefill = next(r for r in rows if r[:3] == ["visual tokens", "vzip", "prefill"])
    assert of_prefill[3:5] == ["1.00", "2.00"], "measured, by formula"
    assert not any(r[0] == "visual tokens" and r[2] == "tower" for r in rows), "its work does not change"
    batches = rows_of(shown, "Batches")
    first = next(dict(zip(batches[0], r, strict=True)) for r in batches[2:] if r[:2] == ["time_to_first_token", "vzip"])
    assert (first["flat from"], first["fixed ms"], first["each further prompt ms"]) == ("32", "6", "2")


def test_each_axis_is_drawn_with_its_numbers(tmp_path: Path) -> None:
    drawings = draw(record())
    assert list(drawings) == list(WORDS)
    paths = write_drawing(drawings["batch"], tmp_path, "curves_batch")
    assert {path.suffix for path in paths} == {".png", ".svg", ".csv", ".txt"} and all(p.stat().st_size for p in paths)
    rows = list(csv.DictReader(paths[2].open()))
    assert len(rows) == 9 and float(rows[6]["time_to_first_token_ms"]) == 134 and rows[6]["batch"] == "64"
    assert "time of one prompt" in drawings["batch"].caption and "A processor, 2 threads" in drawings["batch"].caption


def test_the_page_is_what_its_record_says(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    if (FOLDER / RECORD).exists():
        assert page == put(page, part(read_json(FOLDER / RECORD), FOLDER.name)), "make curves writes it anew"
        assert all((FOLDER / f"curves_{axis}.{ending}").exists() for axis in WORDS for ending in SHOWN)
    written = put(page, part(record(), "performance"))
    assert "performance/curves_frames.png" in written and "| 64 | vzip |" in written and "A processor" in written
    assert put(written, part(record(), "performance")) == written
    with pytest.raises(SystemExit, match="0 places"):
        put("no marks", "")
