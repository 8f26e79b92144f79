"""The demo: its sweep gives eval.py's answers, its scores are the benchmark's, its figures show what was kept."""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image
from tests.writing import held

import vzip
from vzip import cli
from vzip.analysis.plots import Point, plot_retention
from vzip.cli import demo as run
from vzip.config.options import config_dir
from vzip.demo import benchmark, scoring, show
from vzip.demo.questions import TASKS
from vzip.demo.sweep import BUDGETS, run_sweep, score, settings, units
from vzip.errors import ConfigError, ManifestError, RunExistsError


@pytest.fixture(scope="module")
def tiny() -> vzip.CompressedVlm:
    return vzip.load_vlm("vzip/tiny", compressor=vzip.Identity(), dtype="float32")


@pytest.mark.whole
def test_sweep_gives_the_answers_of_eval_through_lmms_eval(tiny, small_benchmark, tmp_path):
    pytest.importorskip("lmms_eval")
    from vzip.evaluation.run import evaluate

    rows = [
        s for s in settings(576) if (s.method, s.num_tokens) in {("vanilla", 576), ("VisionZip", 64), ("random", 32)}
    ]
    swept = run_sweep(tiny, small_benchmark, rows, batch_size=4)
    for row in rows:
        tiny.compressor = row.compressor
        record = evaluate(
            tiny,
            tasks=list(benchmark.TASK_NAMES),
            include_path=small_benchmark,
            run_dir=tmp_path / f"{row.method}{row.num_tokens}",
            batch_size=2,
            progress=False,
        )
        lines = (tmp_path / f"{row.method}{row.num_tokens}" / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        for task in TASKS:
            own = sorted((s for s in samples if s["task"] == f"scenes_{task}"), key=lambda s: s["doc_id"])
            assert [scoring.normalise(s["answer"]) for s in own] == [r["said"] for r in swept[row][task]]
            metric = scoring.METRICS[task].__name__
            assert record["tasks"][f"scenes_{task}"]["metrics"][metric]["value"] == pytest.approx(
                scoring.METRICS[task](swept[row][task])
            )
    tiny.compressor = vzip.Identity()


def test_the_shipped_model_is_trained_and_small(tiny):
    """A few held-out images: far above chance, which random weights are not (the whole table is `make demo`'s)."""
    folder = Path(vzip.__file__).parent / "demo" / "tiny"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 12e6
    assert type(tiny.model).__name__ == "LlavaForConditionalGeneration"
    assert tiny.adapter.geometry.num_patches == 576 and tiny.adapter.geometry.has_cls


def test_trained_model_reads_signs_at_full_and_at_64_tokens(tiny, small_benchmark):
    rows = [s for s in settings(576) if (s.method, s.num_tokens) in {("vanilla", 576), ("VisionZip", 64)}]
    for results in run_sweep(tiny, small_benchmark, rows).values():
        assert scoring.accuracy(results["reading"]) >= 50  # chance is 4


def test_bootstrap_units_reproduce_the_metrics():
    rng = np.random.default_rng(0)
    rows = [
        scoring.Result(answer=("yes", "no")[i % 2], said=("yes", "no")[rng.integers(2)], pair=str(i // 2))
        for i in range(40)
    ]
    for task, metric in scoring.METRICS.items():
        assert units(task, rows).score == pytest.approx(metric(rows))


def test_score_of_vanilla_against_itself_is_exactly_one():
    rows = [scoring.Result(answer="yes", said=s, pair=str(i // 2)) for i, s in enumerate(["yes", "no", "yes", "yes"])]
    got = score(dict.fromkeys(TASKS, rows), dict.fromkeys(TASKS, rows))
    assert (got.retention, got.low, got.high) == (100.0, 100.0, 100.0)


def test_the_overlay_has_a_row_an_image(tiny, small_benchmark, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(show, "draw_overlay", lambda sheets, words: drawn.append((sheets, words)) or Figure())
    show.write_overlay(tiny, small_benchmark, tmp_path / "overlay.png")
    ((sheets, words),) = drawn
    assert [sheet.name for sheet in sheets] == ["image 0", "image 1", "image 2"]
    assert [int(sheet.crops[0].kept.sum()) for sheet in sheets] == [53] * 3
    assert (
        words.tokens == "64 of 576 visual tokens: 54 dominant + 10 contextual" and (tmp_path / "overlay.png").is_file()
    )
    tiny.compressor = vzip.Identity()


def test_plot_is_written(tmp_path):
    plot_retention([Point("a", 32, 80, 78, 82), Point("a", 64, 90, 88, 92)], tmp_path / "p.png", "title")
    assert Image.open(tmp_path / "p.png").size == (1050, 675)


def test_benchmark_refuses_images_that_are_not_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "NUM_IMAGES", 2)
    with pytest.raises(ManifestError, match="digest"):
        benchmark.prepare(tmp_path / "scenes")
    assert not (tmp_path / "scenes").exists()  # nothing half-written stays
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(ManifestError, match="not empty"):
        benchmark.prepare(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep"


def test_several_processes_generate_the_benchmark_once(tmp_path, monkeypatch):
    made = []

    def write(folder: Path) -> str:
        made.append(folder)
        time.sleep(0.2)
        return benchmark.DIGEST

    monkeypatch.setattr(benchmark, "write", write)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: benchmark.prepare(tmp_path / "scenes"), range(3)))
    assert len(made) == 1 and set(found) == {tmp_path / "scenes"}
    before = {path: path.stat().st_mtime_ns for path in found[0].iterdir()}
    benchmark.prepare(tmp_path / "scenes")
    assert {path: path.stat().st_mtime_ns for path in found[0].iterdir()} == before and len(before) > 5


def test_the_budgets_are_those_of_the_options():
    for budget in BUDGETS:
        option = yaml.safe_load((config_dir() / "budget" / f"{budget.num_tokens}tok.yaml").read_text())
        assert vzip.TokenBudget(option["num_dominant"], option["num_contextual"]) == budget


def test_demo_end_to_end_on_two_images_without_lmms_eval(small_benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)  # importing it fails: the core requirements suffice
    monkeypatch.setattr(benchmark, "prepare", lambda: small_benchmark)
    monkeypatch.setattr(show, "measure", lambda rows: [show.Cost(dict.fromkeys(STAGE_NAMES, 1.5), 2048) for _ in rows])
    arguments = argparse.Namespace(out=tmp_path / "demo", limit=2, batch_size=2)
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "PROVISIONAL" in printed and "VisionZip" in printed and "chance" in printed
    table = (tmp_path / "demo" / "table.md").read_text().splitlines()
    assert len(table) == 2 + 1 + 13 + 2  # header, chance, vanilla and four budgets of three methods; that it is limited
    assert "PROVISIONAL" in table[-1]
    record = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [row["num_tokens"] for row in record["rows"]] == [576] + [n for n in (192, 128, 64, 32) for _ in range(3)]
    assert record["provisional"] is True
    for name in ("retention.png", "overlay.png"):
        Image.open(tmp_path / "demo" / name).verify()
    with pytest.raises(ConfigError, match="--limit=0"):
        run.main(argparse.Namespace(out=tmp_path / "demo", limit=0, batch_size=2))


STAGE_NAMES = ("tower", "selection", "prefill", "decode_per_token")


def test_ask_answers_and_counts_tokens(small_benchmark, capsys):
    picture = str(small_benchmark / "images" / "0000.png")
    question = json.loads((small_benchmark / "reading.jsonl").read_text().splitlines()[0])
    assert cli.main(["ask", picture, question["question"], "budget=128tok"]) == 0
    printed = capsys.readouterr().out
    assert "(128 visual tokens, 576 without compression)" in printed
    assert question["answer"] in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.png", "What?"], "missing.png"),
        (["PICTURE", "What?", "budget=32tk"], "32tok"),
        (["PICTURE", "What?", "budget=full"], "compressor"),
        (["PICTURE", "What?", "--model", "tinny"], "tiny"),
    ],
)
def test_ask_refuses_bad_input_before_loading(words, said, small_benchmark, capsys, monkeypatch):
    monkeypatch.setattr(vzip, "load_vlm", lambda *a, **k: pytest.fail("the model was loaded"), raising=False)
    words = [str(small_benchmark / "images" / "0000.png") if w == "PICTURE" else w for w in words]
    assert cli.main(["ask", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_another_demo_writes(tmp_path):
    with held(tmp_path), pytest.raises(RunExistsError, match=r"writes there at this moment.* --out DIR"):
        run.main(argparse.Namespace(out=tmp_path, limit=1, batch_size=1))
