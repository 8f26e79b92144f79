"""What a record of ``vzip bench --curves`` says: rates of growth, measured and by formula, and where gains flatten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
PointRecord = Mapping[str, Any]
VANILLA, VZIP = "vanilla", "vzip"
FIRST_TOKEN = "time_to_first_token"
# Stages whose operations have a closed formula, in the order of the pipeline.
COUNTED = ("tower", "prefill", "decode_per_token")
FLAT = 1.1  # within a tenth of the least time a prompt
MIB = 2**20
WORDS = {"visual_tokens": "visual tokens", "crops": "crops", "batch": "prompts", "frames": "frames"}


@dataclass(frozen=True)
class Line:
    """``time = fixed + per_unit * x``, by least squares.

    Attributes:
        fixed_ms: what is paid however little there is to do; not below 0.
        per_unit_ms: for each further one.
    """

    fixed_ms: float
    per_unit_ms: float


def line(values: Sequence[float], times_ms: Sequence[float]) -> Line:
    """The line of least relative error through the points: each weighs as much, whatever its size.

    Args:
        values: at least one; with a single one all of its time is per unit.
        times_ms: above 0.
    """
    weights = [1 / t**2 for t in times_ms]
    total = math.fsum(weights)
    mean_x = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
    mean_t = math.fsum(w * t for w, t in zip(weights, times_ms, strict=True)) / total
    spread = math.fsum(w * (x - mean_x) ** 2 for w, x in zip(weights, values, strict=True))
    joint = math.fsum(w * (x - mean_x) * (t - mean_t) for w, x, t in zip(weights, values, times_ms, strict=True))
    slope = joint / spread if spread else mean_t / mean_x
    fixed = mean_t - slope * mean_x
    if fixed >= 0:
        return Line(fixed, slope)
    through_zero = math.fsum(w * x * t for w, x, t in zip(weights, values, times_ms, strict=True))
    return Line(0.0, through_zero / math.fsum(w * x * x for w, x in zip(weights, values, strict=True)))


def growth(values: Sequence[float], costs: Sequence[float]) -> float | None:
    """The exponent ``p`` of ``cost ~ value ** p``: the slope of least squares between logarithms; None of one point."""
    if len(set(values)) < 2 or min(costs) <= 0:
        return None
    logs = [(math.log(x), math.log(c)) for x, c in zip(values, costs, strict=True)]
    mean_x, mean_c = (math.fsum(one) / len(logs) for one in zip(*logs, strict=True))
    spread = math.fsum((x - mean_x) ** 2 for x, _ in logs)
    return math.fsum((x - mean_x) * (c - mean_c) for x, c in logs) / spread


def curve(record: Record, axis: str, method: str | None = None) -> list[PointRecord]:
    """The points of an axis in the order of their values; of all methods where none is named."""
    points = [point for point in record["methods"][axis] if method in (None, point["method"])]
    return sorted(points, key=lambda point: point["value"])


def time_ms(point: PointRecord, stage: str) -> float:
    """The median of a stage, over the whole batch."""
    median: float = point["stages"][stage]["median_ms"]
    return median


def operations(point: PointRecord, stage: str) -> int:
    """By the closed formula, or as counted where there is none; over the whole batch."""
    found = point["flops"][stage]
    number: int = found["counted"] if found["formula"] is None else found["formula"]
    return number


def flattens_at(points: Sequence[PointRecord], stage: str = FIRST_TOKEN) -> int:
    """The smallest batch whose time a prompt is within a tenth of the least."""
    per_prompt = {point["value"]: time_ms(point, stage) / point["value"] for point in points}
    least = min(per_prompt.values())
    return min(value for value, own in per_prompt.items() if own <= FLAT * least)


def tables(record: Record) -> str:
    """Everything for a page, as Markdown: the points of each axis, rates of growth, where batches stop gaining."""
    parts = [f"### {name.capitalize()}\n\n{_points(record, axis)}" for axis, name in WORDS.items()]
    return "\n\n".join([*parts, f"### Rates of growth\n\n{_growth(record)}", f"### Batches\n\n{_batches(record)}"])


def machine(record: Record) -> str:
    """What was measured, on what."""
    found, resolved, settings = record["environment"], record["resolved"], record["settings"]
    code = found["code"].get("commit") or found["code"]["source_sha256"]
    return (
        f"{record['model']} ({resolved['num_parameters'] / 1e6:.1f} M parameters), {resolved['dtype']} on"
        f" {resolved['device']}: {found['processor']}, {found['num_threads']} threads, load"
        f" {found['load_average_1min']:.1f} at the end; medians of {settings['repeats']} rounds in turns; torch"
        f" {found['torch']}, transformers {found['transformers']}; {found['time'][:10]}, code {str(code)[:12]};"
        f" `{found['command']}`"
    )


def _points(record: Record, axis: str) -> str:
    head = [WORDS[axis], "method", "prompt tokens", "tower ms", "prefill ms", "first token ms", "a prompt"]
    head += ["decode ms", "KV MiB", "memory added MiB", "GFLOPs"]
    rows = []
    for point in curve(record, axis):
        batch = point["num_prompts"]
        times = [time_ms(point, stage) for stage in ("tower", "prefill", FIRST_TOKEN)]
        times += [times[-1] / batch, time_ms(point, "decode_per_token")]
        sizes = [point["kv_cache_bytes"] / MIB, point["peak_memory_added_bytes"] / MIB]
        work = sum(operations(point, stage) for stage in ("tower", "prefill")) / 1e9
        numbers = [*map(_number, times), *map(_number, sizes), _number(work)]
        rows.append([str(point["value"]), point["method"], str(point["num_prompt_tokens"]), *numbers])
    return _table(head, rows)


def _growth(record: Record) -> str:
    """Exponents, measured beside the formula's, with the fixed cost that parts them."""
    head = ["along", "method", "cost", "measured", "by formula", "fixed ms", "GFLOP/s, least to most"]
    rows = []
    for axis, name in WORDS.items():
        for method in (VANILLA, VZIP):
            points = curve(record, axis, method)
            if len(points) < 2:
                continue
            values = [point["value"] for point in points]
            for stage in COUNTED:
                work = [operations(point, stage) for point in points]
                if len(set(work)) == 1:  # the tower of one image, however many tokens are kept
                    continue
                times = [time_ms(point, stage) for point in points]
                rates = [w / t / 1e6 for w, t in zip(work, times, strict=True)]
                cells = [_exponent(growth(values, times)), _exponent(growth(values, work))]
                cells += [_number(line(values, times).fixed_ms), f"{_number(min(rates))} to {_number(max(rates))}"]
                rows.append([name, method, stage, *cells])
            lengths = [point["num_prompt_tokens"] * point["num_prompts"] for point in points]
            cache = [point["kv_cache_bytes"] for point in points]
            cells = [_exponent(growth(values, cache)), _exponent(growth(values, lengths)), "", ""]
            rows.append([name, method, "KV cache", *cells])
    return _table(head, rows)


def _batches(record: Record) -> str:
    """For each method and stage: from which batch on more prompts gain less than a tenth, and why."""
    head = ["stage", "method", "one prompt ms", "least ms a prompt", "flat from", "fixed ms", "each further prompt ms"]
    rows = []
    for stage in ("tower", "prefill", "decode_per_token", FIRST_TOKEN):
        for method in (VANILLA, VZIP):
            points = curve(record, "batch", method)
            values, times = [p["value"] for p in points], [time_ms(p, stage) for p in points]
            fitted = line(values, times)
            least = min(t / v for v, t in zip(values, times, strict=True))
            cells = [_number(times[0]), _number(least), str(flattens_at(points, stage))]
            rows.append([stage, method, *cells, _number(fitted.fixed_ms), _number(fitted.per_unit_ms)])
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _exponent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
