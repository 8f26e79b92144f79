"""What `python -m vzip demo` does: evaluates and measures every method and budget; table, figures and files."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import PIL
import torch
import transformers
from PIL import Image
from rich.console import Console

from vzip.analysis.kept import kept_sheets
from vzip.analysis.overlay import Words, as_image, draw_overlay
from vzip.analysis.plots import Point, plot_retention
from vzip.compressors.budget import TokenBudget
from vzip.compressors.visionzip import VisionZip
from vzip.demo import benchmark
from vzip.demo.cost import Cost, measure
from vzip.demo.questions import TASKS
from vzip.demo.sweep import Score, Setting, run_sweep, score, settings
from vzip.evaluation.benchmarks.protocols import PROTOCOLS
from vzip.models.load import load_vlm
from vzip.models.vlm import CompressedVlm
from vzip.results.files import replace_file, write_json, written_aside
from vzip.results.layout import Layout, Piece, print_layout, to_markdown

OVERLAY_IMAGES = 3
HEAD = ("tokens", "method", *TASKS, "average", "retention [95 %]", "tower", "select", "prefill", "decode", "KV KiB")


def lay_out(
    rows: list[Setting], scores: list[Score], costs: list[Cost], chances: dict[str, float], title: str
) -> Layout:
    """A line of chance levels, one of vanilla, then a block of methods a budget."""
    average = sum(chances.values()) / len(chances)
    chance = ["", "chance (blind)", *(f"{chances[t]:.1f}" for t in TASKS), f"{average:.1f}"]
    blocks = {"chance": [chance + [""] * (len(HEAD) - len(chance))]}
    for row, got, cost in zip(rows, scores, costs, strict=True):
        ms = cost.milliseconds
        vanilla = row.method == "vanilla"
        blocks.setdefault(str(row.num_tokens), []).append(
            [
                str(row.num_tokens),
                row.method,
                *(f"{got.tasks[t]:.1f}" for t in TASKS),
                f"{got.average:.1f}",
                "100" if vanilla else f"{got.retention:.1f} [{got.low:.1f}, {got.high:.1f}]",
                f"{ms['tower']:.1f}",
                "-" if vanilla else f"{ms['selection']:.2f}",
                f"{ms['prefill']:.1f}",
                f"{ms['decode_per_token']:.1f}",
                f"{cost.kv_cache_bytes / 1024:.0f}",
            ]
        )
    pieces = (tuple(tuple(map(Piece, line)) for line in block) for block in blocks.values())
    return Layout(title, HEAD, tuple(pieces), (), left=frozenset({1}))


def write_overlay(vlm: CompressedVlm, folder: Path, out: Path) -> None:
    """Draws what VisionZip keeps and merges at 64 tokens on the benchmark's first images, one below the other."""
    vlm.compressor = VisionZip(TokenBudget(54, 10))
    sheets, tokens = [], ""
    for index in range(OVERLAY_IMAGES):
        ((sheet,), tokens) = kept_sheets(vlm, Image.open(folder / f"images/{index:04d}.png"))
        sheets.append(replace(sheet, name=f"image {index}"))
    with written_aside(out) as aside:
        as_image(draw_overlay(sheets, Words("built-in model, VisionZip", tokens))).save(aside)


def show(out: Path, limit: int | None, batch_size: int) -> None:
    """Writes table, results, plot and image into a folder.

    Args:
        out: the folder.
        limit: only the first images; None: all.
        batch_size: images at a time.
    """
    folder = benchmark.prepare()
    vlm = load_vlm("vzip/tiny", dtype="float32")
    rows = settings(vlm.adapter.read_inputs(**vlm.adapter.blank_images(1)).images[0].num_vanilla)
    results = run_sweep(vlm, folder, rows, batch_size, limit)
    print("scoring, with 2000 bootstrap resamples a setting ...")
    scores = [score(results[row], results[rows[0]]) for row in rows]
    print("measuring cost, one prompt at a time ...")
    costs = measure(rows)
    chances = {task: chance for task in TASKS if (chance := PROTOCOLS[f"scenes_{task}"].chance) is not None}
    count = sum(len(r) for r in results[rows[0]].values())
    provisional = f" PROVISIONAL: first {limit} images only." if limit else ""
    title = (
        f"built-in model on scenes, {count} questions; existence F1, counting MME, others exact match, %.{provisional}"
    )
    table = lay_out(rows, scores, costs, chances, title)
    print_layout(table, Console())

    remark = f"\n{provisional.strip()}\n" if provisional else ""
    replace_file(out / "table.md", to_markdown(replace(table, title="")) + remark)
    record = {
        "provisional": limit is not None,
        "num_questions": count,
        "chance": chances,
        "rows": [
            {
                "method": row.method,
                "num_tokens": row.num_tokens,
                "scores": got.tasks,
                "average": got.average,
                "retention_percent": [got.retention, got.low, got.high],
                "median_ms": cost.milliseconds,
                "kv_cache_bytes": cost.kv_cache_bytes,
            }
            for row, got, cost in zip(rows, scores, costs, strict=True)
        ],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "pillow": PIL.__version__},
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_json(out / "results.json", record)
    points = [
        Point(row.method, row.num_tokens, got.retention, got.low, got.high, limit is not None)
        for row, got in zip(rows[1:], scores[1:], strict=True)
    ]
    with written_aside(out / "retention.png") as aside:
        plot_retention(points, aside, "Built-in model on scenes, training-free")
    write_overlay(vlm, folder, out / "overlay.png")
    print(f"written to {out}/: table.md, results.json, retention.png, overlay.png")
