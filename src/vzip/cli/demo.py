"""The whole story on the built-in model, offline: every method and budget in one table, a plot and an image.

  python -m vzip demo                   some minutes on two cores (make demo)
  python -m vzip demo --limit 20        twenty of its 400 images: the table is provisional
  python -m vzip demo --out DIR         elsewhere than runs/demo

Evaluates vanilla (all 576 visual tokens), VisionZip and two controls at 192, 128, 64 and 32 tokens on the 1600
questions of the scenes benchmark, measures what each costs, and writes to `--out`: table.md, results.json,
retention.png and overlay.png (kept patches and merge groups). Files of an earlier demo there are replaced.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import PIL
import torch
import transformers
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from vzip.analysis.overlay import draw_overlay
from vzip.analysis.plots import Point, plot_retention
from vzip.bench.settings import BUDGETS
from vzip.compressors.base import TokenBudget
from vzip.compressors.visionzip import VisionZip
from vzip.demo import benchmark, scoring
from vzip.demo.cost import Cost, measure
from vzip.demo.questions import TASKS
from vzip.demo.sweep import Score, Setting, run_sweep, score, settings
from vzip.errors import ConfigError
from vzip.models.load import load_vlm
from vzip.models.vlm import CompressedVlm

OVERLAY_PICTURES = 3
TABLE_WIDTH = 150
COLUMNS = (
    ("tokens", "right"),
    ("method", "left"),
    *((task, "right") for task in TASKS),
    ("average", "right"),
    ("retention [95 %]", "right"),
    ("tower", "right"),
    ("select", "right"),
    ("prefill", "right"),
    ("decode", "right"),
    ("KV KiB", "right"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for table, plot and overlay")
    parser.add_argument("--limit", type=int, default=None, help="only the first N of the 400 images (provisional)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time")


def table_cells(
    rows: list[Setting], scores: list[Score], costs: list[Cost], chances: dict[str, float]
) -> list[list[str]]:
    """The table's body as text: a line of chance levels, then one line a setting."""
    blank = [""] * (len(COLUMNS) - 3 - len(TASKS))
    average = sum(chances.values()) / len(chances)
    body = [["", "chance (blind)", *(f"{chances[t]:.1f}" for t in TASKS), f"{average:.1f}", *blank]]
    for row, got, cost in zip(rows, scores, costs, strict=True):
        ms = cost.milliseconds
        vanilla = row.method == "vanilla"
        body.append(
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
    return body


def markdown(body: list[list[str]]) -> str:
    """The table as GitHub Markdown."""
    lines = [[name for name, _ in COLUMNS], ["---:" if side == "right" else "---" for _, side in COLUMNS], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def print_table(body: list[list[str]], title: str) -> None:
    """Prints to the terminal; a narrower one than the table needs wraps its lines rather than squeezing every cell."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, side in COLUMNS:
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]  # "left" and "right" are rich's own literals
    for number, line in enumerate(body):
        table.add_row(*line, end_section=number < 2 or (number - 1) % 3 == 0)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)


def write_overlay(vlm: CompressedVlm, folder: Path, out: Path) -> None:
    """Draws what VisionZip keeps and merges at 64 tokens on the benchmark's first images, one below the other."""
    compressor = VisionZip(TokenBudget(*BUDGETS["64tok"]))
    pictures = [Image.open(folder / f"images/{index:04d}.png").convert("RGB") for index in range(OVERLAY_PICTURES)]
    with torch.inference_mode():
        vision = vlm.adapter.image_output(
            vlm.adapter.read_inputs(**vlm.preprocess_images(pictures)), compressor.reads()
        )
        tokens = compressor(vision)
    panels = [draw_overlay(p, tokens, row, vision.grid, vision.has_cls) for row, p in enumerate(pictures)]
    sheet = Image.new("RGB", (panels[0].width, sum(p.height + 8 for p in panels) - 8), "white")
    for row, panel in enumerate(panels):
        sheet.paste(panel, (0, row * (panel.height + 8)))
    sheet.save(out)


def main(arguments: argparse.Namespace) -> int:
    """Evaluates, measures, prints and writes."""
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be 1 or more")
    folder = benchmark.prepare()
    vlm = load_vlm("vzip/tiny", dtype="float32")
    rows = settings(vlm.adapter.geometry.num_patches)
    results = run_sweep(vlm, folder, rows, arguments.batch_size, arguments.limit)
    print("scoring, with 2000 bootstrap resamples a setting ...")
    scores = [score(results[row], results[rows[0]]) for row in rows]
    print("measuring cost, one prompt at a time ...")
    costs = measure(rows)
    chances = {task: scoring.chance(task, benchmark.load_rows(folder, task)) for task in TASKS}
    body = table_cells(rows, scores, costs, chances)
    count = sum(len(r) for r in results[rows[0]].values())
    provisional = f" PROVISIONAL: first {arguments.limit} images only." if arguments.limit else ""
    title = (
        f"built-in model on scenes, {count} questions; existence F1, counting MME, others exact match, %.{provisional}"
    )
    print_table(body, title)

    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(markdown(body) + (f"\n{provisional.strip()}\n" if provisional else ""))
    record = {
        "provisional": arguments.limit is not None,
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
    (arguments.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    points = [
        Point(row.method, row.num_tokens, got.retention, got.low, got.high, arguments.limit is not None)
        for row, got in zip(rows[1:], scores[1:], strict=True)
    ]
    plot_retention(points, arguments.out / "retention.png", "Built-in model on scenes, training-free")
    write_overlay(vlm, folder, arguments.out / "overlay.png")
    print(f"written to {arguments.out}/: table.md, results.json, retention.png, overlay.png")
    return 0
