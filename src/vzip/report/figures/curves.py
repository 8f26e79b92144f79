"""Cost against visual tokens, crops, prompts at once and frames, from a record of ``vzip bench --curves``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vzip.installed import missing_package
from vzip.report.curves import FIRST_TOKEN, MIB, VANILLA, VZIP, WORDS, curve, flattens_at, machine, operations, time_ms

from .drawing import Drawing

STAGES = {
    "tower": "vision tower",
    "prefill": "prefill",
    "decode_per_token": "one more token",
    FIRST_TOKEN: "first token",
}
SIZES = {"kv_cache_bytes": "key-value cache", "peak_memory_added_bytes": "added by a pass"}
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
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    of_time, of_memory, of_work = figure.subplots(1, 3)
    rows, places = [], set()
    for method in (VZIP, VANILLA):
        points = curve(record, axis, method)
        if not points:
            continue
        values = [point["value"] for point in points]
        places |= {value for value in values if len(points) > 1}
        marker, line = MARKERS[method]
        style = {"marker": marker, "linestyle": line, "markersize": 4}
        for number, (stage, words) in enumerate(STAGES.items()):
            shown = {"color": f"C{number}", "label": f"{words}, {method}", **style}
            shares = [point["num_prompts"] if axis == "batch" else 1 for point in points]
            low, middle, high = (
                [point["stages"][stage][name] / share for point, share in zip(points, shares, strict=True)]
                for name in ("q1_ms", "median_ms", "q3_ms")
            )
            spread = [[b - a for a, b in zip(*pair, strict=True)] for pair in ((low, middle), (middle, high))]
            of_time.errorbar(values, middle, spread, **shown)
            if stage != FIRST_TOKEN:
                of_work.plot(values, [operations(point, stage) / 1e9 for point in points], **shown)
        for number, (key, words) in enumerate(SIZES.items()):
            sizes = [point[key] / MIB for point in points]
            of_memory.plot(values, sizes, color=f"C{number}", label=f"{words}, {method}", **style)
        if axis == "batch":
            flat = flattens_at(points)
            of_time.axvline(flat, color="0.5", linestyle=line, label=f"flat from {flat}, {method}")
        rows += [_row(axis, point) for point in points]
    of_one = " a prompt" if axis == "batch" else ""
    for axes, what in ((of_time, f"milliseconds{of_one}"), (of_memory, "MiB"), (of_work, "10⁹ operations")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(places)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.set_xlabel(WORDS[axis] + (" at once" if axis == "batch" else ""))
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    whole = "time of one prompt, the rest of the whole batch" if axis == "batch" else "of one prompt"
    caption = f"Cost against {WORDS[axis]}, {whole}; bars are quartiles. {machine(record)}."
    return Drawing(figure, rows, caption)


def _row(axis: str, point: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {axis: point["value"], "method": point["method"]}
    row |= {f"{stage}_ms": round(time_ms(point, stage), 4) for stage in STAGES}
    row |= {key: point[key] for key in ("num_prompt_tokens", "kv_cache_bytes", "peak_memory_added_bytes")}
    return row | {f"{stage}_flops": operations(point, stage) for stage in STAGES if stage != FIRST_TOKEN}
