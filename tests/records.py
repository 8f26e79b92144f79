"""Records of evaluations as they stand on disk, made by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from vzip.cli import compare as comparison
from vzip.results.paired import Paired, compare_task
from vzip.results.record import Run


def record(compressor="VisionZip", scores=(0.6, 0.7), **change):
    def task(metrics, primary, unit):
        entries = {k: {"value": v, "standard_error": e, "standard_error_source": "x"} for k, (v, e) in metrics.items()}
        return {"primary_metric": primary, "unit": unit, "chance": None, "num_samples": 50, "metrics": entries}

    return {
        "schema_version": 1,
        "kind": "evaluation",
        "created": "2026-01-01",
        "config": {"recipe": "mine"},
        "gen_kwargs": {},
        "system_prompt": None,
        "limit": None,
        "model": {"name_or_path": "m", "revision": None, "class": "L", "dtype": "float16", "preprocess": "llava"},
        "compressor": {"name": compressor, "settings": compressor},
        "visual_tokens": {"budget_per_crop": 64, "measured_min": 64, "measured_max": 64, "num_images": 100},
        "tasks": {
            "gqa": task({"exact_match": (scores[0], 0.01)}, "exact_match", "fraction"),
            "mme": task({"p": (100 * scores[1], None), "c": (30.0, None)}, "p+c", "points"),
        },
        "data": {"gqa": {"questions_sha256": "g"}, "mme": {"questions_sha256": "m"}},
        "wall_time_s": 3.2,
        "peak_memory_gib": {"process": 1.0, "cuda": None},
        "provisional": False,
        "provisional_reasons": [],
    } | change


def run_main(*args):
    parser = argparse.ArgumentParser()
    comparison.add_arguments(parser)
    return comparison.main(parser.parse_args([str(arg) for arg in args]))


VANILLA, COMPRESSED = [1.0] * 40 + [0.0] * 10, [1.0] * 20 + [0.0] * 30


def put(folder: Path, name: str, content: dict[str, Any], scores: list[float]) -> Run:
    run = folder / "runs" / "eval" / name / "x-y" / "seed0"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(content))
    rows = [
        {"task": "gqa", "doc_id": i, "question": "q", "target": "t", "answer": f"{s}", "scores": {"exact_match": s}}
        for i, s in enumerate(scores)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(run / "run.json", content)


def scored(scores: list[float], error: float | None = 0.03) -> dict[str, Any]:
    metric = {"exact_match": {"value": float(np.mean(scores)), "standard_error": error}}
    return {"tasks": {"gqa": {"metrics": metric, "num_samples": len(scores)}}}


def samples(scores: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "doc_id": i,
            "filter_index": 0,
            "question": f"q{i}",
            "target": "yes",
            "answer": f"a{s:g}",
            "scores": {"exact_match": s},
        }
        for i, s in enumerate(scores)
    ]


def compared(ours: list[float], base: list[float], *rows: Any, **settings: Any) -> Paired:
    found = compare_task(scored(ours), scored(base), "gqa", "exact_match", *rows, **settings)
    assert found is not None
    return found
