"""Runs to look at, made by hand: of the built-in model's configuration, with answers of any text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from tests.records import record

from vzip.config.build import resolved
from vzip.config.options import config_dir

VANILLA, COMPRESSED = ("compressor=none", "budget=full"), ("compressor=visionzip", "budget=32tok")


def put(folder: Path, words: Sequence[str], rows: Sequence[dict[str, Any]]) -> Path:
    """A run directory; the score of each task is the mean of its rows'."""
    name = "Identity" if "compressor=none" in words else "VisionZip"
    content = record(name, config=json.loads(_config(tuple(words))))
    content["tasks"] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        values = [row["scores"]["accuracy"] for row in rows if row["task"] == task]
        score = {"value": sum(values) / len(values), "standard_error": None}
        content["tasks"][task] = {
            "primary_metric": "accuracy",
            "unit": "fraction",
            "num_samples": len(values),
            "metrics": {"accuracy": score},
        }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@cache
def _config(words: tuple[str, ...]) -> str:
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        return json.dumps(resolved(compose("eval", list(words))))


def row(number: int, right: bool, task: str = "made_up", **change: Any) -> dict[str, Any]:
    return {
        "task": task,
        "doc_id": number,
        "filter_index": 0,
        "question": f"Question {number}: what is it?",
        "target": f"target {number}",
        "answer": f"target {number}" if right else f"something else {number}",
        "scores": {"accuracy": float(right)},
        "num_visual_tokens": [32],
        "group": ("colour", "shape", "count")[number % 3],
    } | change
