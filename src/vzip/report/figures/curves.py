"""Cost against visual tokens, crops, prompts at once and frames, from a record of ``vzip bench --curves``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vzip.installed import missing_package
from vzip.report.curves import FIRST_TOKEN, MIB, VANILLA, VZIP, WORDS, curve, machine, operations, time_ms

from .drawing import Drawing

STAGES = {"tower": "vision tower", "prefill": "prefill", "decode_per_token": "one more token", FIRST_TOKEN: "first token"}
MARKERS = {VZIP: ("o", "-"), VANILLA: ("s", "--")}


def draw(record: Mapping[str, Any]) -> dict[str, Drawing]:
    """A figure an axis: time, key-value cache with memory added, operations; of the whole batch.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    return {axis: _of_axis(record, axis) for axis in WORDS}


def _of_axis(record: Mapping[str, Any], axis: str) -> Drawing:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("the figures", "matplotlib", error) from error
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    of_time, of_memory, of_work = figure.subplots(1, 3)
    rows = []
    for method in (VZIP, VANILLA):
        points = curve(record, axis, method)
        if not points:
            continue
        values = [point["value"] for point in points]
        marker, style = MARKERS[method]
        for number, (stage, words) in enumerate(STAGES.items()):
            medians = [time_ms(point, stage) for point in points]
            spread = [
                [median - point["stages"][stage]["q1_ms"] for median, point in zip(medians, points, strict=True)],
                [point["stages"][stage]["q3_ms"] - median for median, point in zip(medians, points, strict=True)],
            ]
            of_time.errorbar(
                values, medians, spread, color=f"C{number}", marker=marker, linestyle=style, label=f"{words}, {method}"
            )
            if stage != FIRST_TOKEN:
                work = [operations(point, stage) / 1e9 for point in points]
                of_work.plot(
                    values, work, color=f"C{number}", marker=marker, linestyle=style, label=f"{words}, {method}"
                )
        for number, (key, words) in enumerate(
            {"kv_cache_bytes": "key-value cache", "peak_memory_added_bytes": "added by a pass"}.items()
        ):
            sizes = [point[key] / MIB for point in points]
            of_memory.plot(
                values, sizes, color=f"C{number}", marker=marker, linestyle=style, label=f"{words}, {method}"
            )
        rows += [_row(axis, point) for point in points]
    for axes, what in ((of_time, "milliseconds"), (of_memory, "MiB"), (of_work, "10⁹ operations")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(WORDS[axis])
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    caption = f"Cost against {WORDS[axis]}, of the whole batch; bars are quartiles. {machine(record)}."
    return Drawing(figure, rows, caption)


def _row(axis: str, point: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {axis: point["value"], "method": point["method"]}
    row |= {f"{stage}_ms": round(time_ms(point, stage), 4) for stage in STAGES}
    row |= {key: point[key] for key in ("num_prompt_tokens", "kv_cache_bytes", "peak_memory_added_bytes")}
    return row | {f"{stage}_flops": operations(point, stage) for stage in STAGES if stage != FIRST_TOKEN}
