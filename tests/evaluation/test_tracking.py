"""What Weights & Biases is told of an evaluation, and that an evaluation neither fails with it nor waits for it."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tests.evaluation.conftest import picture
from tests.records import COMPRESSED, VANILLA, put, record

from vzip.analysis.plots import plot_retention
from vzip.errors import ImageError, MissingPackageError
from vzip.evaluation import tracking
from vzip.evaluation.run import evaluate


class FakeWandb:
    """Stands in for wandb; ``logged`` is what its run was told, ``trouble`` what happens on each call of ``log``."""

    Error = type("Error", (Exception,), {})

    class Settings(SimpleNamespace):
        model_fields = ("finish_timeout",)

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
            self.columns, self.data = columns, data

    class Image:
        def __init__(self, source: Any, caption: str = "") -> None:
            self.source, self.caption = source, caption

    def __init__(self, trouble: Any = lambda: None) -> None:
        self.trouble, self.logged, self.ended, self.runs = trouble, [], [], []

    def init(self, **arguments: Any) -> Any:
        self.runs.append(arguments)

        def log(content: dict[str, Any]) -> None:
            self.trouble()
            self.logged.append(content)

        return SimpleNamespace(log=log, finish=lambda exit_code: self.ended.append(exit_code))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def run(vlm: Any, include_path: Path, run_dir: Path, tasks: tuple[str, ...] = ("own_exact", "own_text")) -> Any:
    settings: dict[str, Any] = {"include_path": include_path, "progress": False, "trackers": ["wandb"]}
    return evaluate(vlm, tasks=list(tasks), run_dir=run_dir, resolved_config={"recipe": "mine"}, **settings)


def test_what_is_told(fake: FakeWandb, vlm: Any, include_path: Path, tmp_path: Path) -> None:
    told_of = run(vlm, include_path, tmp_path / "run")
    (content,) = fake.logged
    assert fake.ended == [0] and fake.runs[0]["mode"] == "offline" and fake.runs[0]["config"] == {"recipe": "mine"}
    value = told_of["tasks"]["own_exact"]["metrics"]["exact_match"]["value"]
    assert content["own_exact/exact_match"] == value and "retention" not in content
    assert [row[:3] for row in content["scores"].data] == [
        ["own_exact", "exact_match", value],
        ["own_text", "exact_match", told_of["tasks"]["own_text"]["metrics"]["exact_match"]["value"]],
    ]
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    captions = [
        f"own_exact: {row['question']}\nanswer: {row['answer']}\nright: {row['target']}"
        for row in rows
        if row["task"] == "own_exact"
    ]
    assert len(content["samples"]) == 2, "two a task, and none of a task without pictures"
    for shown in content["samples"]:
        assert shown.caption in captions
        assert shown.source.width > 1000 > shown.source.height, "kept patches and merge groups, side by side"


def refused() -> None:
    raise FakeWandb.Error("the server said no")


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(refused, "wandb stopped (Error: the server said no)"), (lambda: time.sleep(1), "did not finish within 0.1 s")],
)
def test_trouble_is_a_warning(
    fake: FakeWandb,
    vlm: Any,
    include_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: Any,
    said: str,
) -> None:
    fake.trouble = trouble
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING, "vzip"):
        told_of = run(vlm, include_path, tmp_path / "run", ("own_text",))
    assert said in caplog.text and told_of["tasks"] and (tmp_path / "run" / "run.json").is_file()
    assert fake.ended == []


def test_wandb_must_be_there_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, vlm: Any, include_path: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"eval\.trackers=\[wandb\] needs the package wandb"):
        run(vlm, include_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_retention_over_the_runs_of_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = put(tmp_path, "ours", record(), COMPRESSED)
    assert tracking.draw_retention(ours) is None, "no vanilla run"
    put(tmp_path, "vanilla", record("Identity", (0.8, 1.7)), VANILLA)
    ours = put(tmp_path, "again", record(scores=(0.4, 0.7)), COMPRESSED)
    put(tmp_path, "limited", record(scores=(0.4, 0.7), limit=5), COMPRESSED)
    tuned = {"recipe": "mine", "model": {"projector": "p"}}
    put(tmp_path, "tuned", record(scores=(0.4, 0.7), config=tuned), COMPRESSED)
    drawn = []
    monkeypatch.setattr(tracking, "plot_retention", lambda *given: drawn.append(given) or plot_retention(*given))
    plot = tracking.draw_retention(ours)
    ((points, _, title),) = drawn
    assert title == "m" and [point.method for point in points] == ["VisionZip", "VisionZip", "VisionZip, tuned"]
    assert points[0].num_tokens == 64 and points[0].retention == pytest.approx(50, abs=1)
    assert plot == ours.path.with_name("retention.png") and plot.read_bytes().startswith(b"\x89PNG")


def test_an_image_that_cannot_be_drawn_is_left_out(
    vlm: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"task": "t", "doc_id": i, "filter_index": 0, "question": f"q{i}", "target": "a", "answer": "b"} for i in (0, 1)
    ]

    asked: list[str] = []

    def draw(vlm: Any, image: Image.Image, question: str, *, answer: str) -> Image.Image:
        asked.append(question)  # what text-aware methods read
        assert answer == "b"
        if image.height == 40:
            raise ImageError("too dark")
        return image

    monkeypatch.setattr(tracking, "draw_kept", draw)
    found = tracking.shown_samples(
        vlm, rows, {("t", 0, 0): picture(0), ("t", 1, 0): picture(1), ("t", 2, 0): picture(2)}
    )
    assert [sample.question for sample in found] == ["q1"] and "too dark" in caplog.text
    assert asked == ["q0", "q1"]
