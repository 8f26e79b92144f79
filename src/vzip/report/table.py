"""A record as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from vzip.results.record import metrics_of, score_of, title_of, visual_tokens_of


def print_record(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints model, measured visual tokens, every metric with its standard error, time and memory.

    Args:
        record: as ``vzip.evaluation.run.evaluate`` returns it; nothing is printed for the empty dict of other ranks.
        console: where to; standard output if None.
    """
    if not record:
        return
    console = console or Console()
    pruner = record.get("pruner")
    tokens = record["visual_tokens"]
    console.print(title_of(record), markup=False, highlight=False, soft_wrap=True)  # a table's own title is broken
    table = Table(caption=_caption(record), caption_justify="left")
    for name, side in (("task", "left"), ("metric", "left"), ("score", "right"), ("± s.e.", "right")):
        table.add_column(name, justify="left" if side == "left" else "right")
    table.add_column("questions", justify="right")
    for task, entry in record["tasks"].items():
        first = True
        for metric in metrics_of(record, task):
            score = score_of(record, task, metric)
            assert score is not None
            mark = " (primary)" if metric == entry["primary_metric"] and len(entry["metrics"]) > 1 else ""
            error = "" if score.standard_error is None else f"{score.standard_error:.4g}"
            questions = f"{score.num_samples}" if first else ""
            value = f"{score.value:.4g}" + ("*" if record["provisional"] else "")
            table.add_row(task if first else "", metric + mark, value, error, questions)
            first = False
            if metric == entry["primary_metric"]:
                for name, group in entry.get("groups", {}).items():
                    error = "" if group["standard_error"] is None else f"{group['standard_error']:.4g}"
                    label = f"  {entry['grouped_by']} {name}"
                    value = f"{group['value']:.4g}" + ("*" if record["provisional"] else "")
                    table.add_row("", label, value, error, f"{group['num_samples']}")
    console.print(table)
    measured = f"{tokens['measured_min']}"
    if tokens["measured_max"] != tokens["measured_min"]:
        measured += f" to {tokens['measured_max']}"
    console.print(f"visual tokens an image, measured: {measured} ({tokens['num_images']} images)")
    if pruner:
        least, most = visual_tokens_of(record)
        average = f"{least}" if least == most else f"{least} to {most}"
        console.print(f"of these the language model's layers attended to {average} on average, measured")
    unjudged = [task for task, entry in record["tasks"].items() if entry["unit"] and entry["primary_metric"] is None]
    if unjudged:
        console.print(f"not the paper's metric, which a judge model adds (python -m vzip judge): {', '.join(unjudged)}")
    for reason in record["provisional_reasons"]:
        console.print(f"* provisional: {reason}")


def _caption(record: Mapping[str, Any]) -> str:
    memory = record["peak_memory_gib"]
    parts = [f"{record['wall_time_s']:.0f} s", f"peak memory {memory['process']:.1f} GiB"]
    if memory["cuda"] is not None:
        parts.append(f"GPU {memory['cuda']:.1f} GiB")
    return ", ".join(parts)
