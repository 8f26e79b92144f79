"""What a row costs: time and memory, from evaluations, from ``python -m vzip bench`` and from trainings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vzip.errors import ManifestError
from vzip.json_files import read_json, read_json_lines
from vzip.methods import method_names
from vzip.option_files import read_yaml
from vzip.results.record import Run

from .paper_tables import Column, Row

logger = logging.getLogger(__name__)

MIB_PER_GIB = 1024
MS_PER_HOUR = 3_600_000
# What a training's log says of a step's time (``vzip.train.stepping``).
STEP_PARTS = ("data", "forward", "backward", "update")
# Vanilla's own count may be off the paper's: LLaVA-NeXT gives a square image 2928 tokens, newlines included.
VANILLA_COUNT_TOLERANCE = 0.05


@dataclass(frozen=True)
class Cost:
    """A measured cost.

    Attributes:
        value: in the column's unit.
        path: the file it stands in.
        machine: what it was measured on; costs of two machines have no ratio.
        num_questions: that the time is of; 0 where it is not a time of questions. Other numbers have no ratio either.
        reasons: why it is not final.
    """

    value: float
    path: Path
    machine: str
    num_questions: int = 0
    reasons: tuple[str, ...] = ()

    def comparable(self, other: Cost) -> bool:
        return (self.machine, self.num_questions) == (other.machine, other.num_questions)


@dataclass(frozen=True)
class Bench:
    """A ``bench.json``."""

    path: Path
    content: Mapping[str, Any]


def machine_of(record: Mapping[str, Any]) -> str:
    """The processor that a record's model ran on, and in how many processes and batches where that is said."""
    hardware = record.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    on_gpu = str(record.get("model", {}).get("device", "cuda")).startswith("cuda")
    name = _counted(gpus) if gpus and on_gpu else str(hardware.get("cpu", "a machine that is not named"))
    batch, processes = record.get("batch_size"), record.get("num_processes", 1)
    return name + (f", batches of {batch}" if batch else "") + (f", {processes} processes" if processes != 1 else "")


def _counted(names: Sequence[str]) -> str:
    return ", ".join(
        name if names.count(name) == 1 else f"{names.count(name)} x {name}" for name in dict.fromkeys(names)
    )


def cost_of_run(run: Run, column: Column) -> Cost | None:
    """A cost that an evaluation recorded; None where this one does not tell it."""
    record = run.record
    if column.task is not None and list(record["tasks"]) != [column.task]:
        return None  # the time of several benchmarks is not the time of one
    is_time = column.cost == "wall_time_s"
    if is_time and took_something_over(record):
        return None
    value: Any = record
    for name in (column.cost or "").split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        return None
    value = value * MIB_PER_GIB if column.unit == "MB" else value
    num_questions = sum(task["num_samples"] for task in record["tasks"].values()) if is_time else 0
    reasons = tuple(record.get("provisional_reasons", ()))
    return Cost(value, run.path, machine_of(record), num_questions, reasons)


def took_something_over(record: Mapping[str, Any]) -> bool:
    """Whether answers of an interrupted run, or outputs of a sweep's other jobs, took no time in this run."""
    return bool(record.get("num_resumed_answers") or (record.get("tower_cache") or {}).get("num_hits"))


def find_benches(folder: Path) -> list[Bench]:
    """Every measurement of ``python -m vzip bench`` below a runs folder, the oldest first; what is none is named."""
    found = []
    for path in folder.glob("bench/**/bench.json"):
        try:
            content = read_json(path)
            found.append((str(content["environment"]["time"]), str(path), Bench(path, content)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "%s: left out, it is no measurement of `python -m vzip bench` (%s: %s). Remove it, or measure again"
                " with overwrite=true.",
                path,
                type(error).__name__,
                error,
            )
    return [bench for *_, bench in sorted(found, key=lambda entry: entry[:2])]


def is_of_visionzip(content: Mapping[str, Any]) -> bool:
    """Whether what a measurement calls ``vzip`` is VisionZip as its file sets it, and no other compressor."""
    settings = content.get("settings") or {}
    changed = (settings.get("method_settings") or {}).get("compressor")
    return settings.get("compressor", "visionzip") == "visionzip" and not changed


def cost_of_bench(benches: Iterable[Bench], row: Row, column: Column) -> list[Cost]:
    """The stage's median in ms in every measurement of the row's model at its number of tokens, the newest last.

    Of a row with a pruner: in every measurement of that pruner with the row's settings, as all tokens enter.
    """
    is_vanilla, (pruner, settings) = row.method.startswith("vanilla"), bench_pruner(row)
    found = []
    for bench in benches:
        content = bench.content
        entry = content["methods"].get("vanilla" if is_vanilla else pruner or "vzip")
        if entry is None or content["model"] != bench_model(row) or column.bench not in entry["stages"]:
            continue
        if not is_vanilla and pruner is None and not is_of_visionzip(content):
            continue
        if pruner is not None:
            if (content["settings"].get("method_settings") or {}).get("pruner", {}) != settings:
                continue
        elif abs(entry["num_visual_tokens"] - row.tokens) > (VANILLA_COUNT_TOLERANCE * row.tokens if is_vanilla else 0):
            continue
        code = content["environment"].get("code") or {}
        reasons = ("the checkout had changes that are not committed",) if code.get("dirty") else ()
        milliseconds = float(entry["stages"][column.bench]["median_ms"])
        found.append(Cost(milliseconds, bench.path, _bench_machine(content), reasons=reasons))
    return found


def bench_model(row: Row) -> str | None:
    """The model among a row's overrides for ``python -m vzip bench``."""
    return next((word.removeprefix("model=") for word in row.bench if word.startswith("model=")), None)


def bench_pruner(row: Row) -> tuple[str | None, dict[str, Any]]:
    """The pruner that a row's measurement names among its methods, and its settings; (None, {}) where there is none."""
    words = dict(word.split("=", 1) for word in row.bench)
    named = [name for name in words.get("methods", "").split(",") if name in method_names("pruner")]
    settings = {
        key.removeprefix("pruner."): read_yaml(value) for key, value in words.items() if key.startswith("pruner.")
    }
    return (named[0], settings) if named else (None, {})


def _bench_machine(content: Mapping[str, Any]) -> str:
    batch = (content.get("settings") or {}).get("batch_size")
    return content["environment"]["processor"] + (f", batches of {batch}" if batch else "")


def cost_of_training(directory: Path, column: Column) -> Cost | None:
    """A finished training's hours, or its peak memory on one GPU; None where it is not finished or does not tell.

    Hours are the sum over the steps, those before an interruption included; loading, saving and validation are not.

    Raises:
        ManifestError: a log that cannot be read.
    """
    header_path, log = directory / "final" / "tuned.json", directory / "metrics.jsonl"
    if not header_path.is_file() or not log.is_file():
        return None
    try:
        header = dict(read_json(header_path))
        steps = list(read_json_lines(log))
        hours = sum(step[f"{part}_ms"] for step in steps for part in STEP_PARTS) / MS_PER_HOUR
        memory_gib = max(step["peak_memory_gib"] for step in steps)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{log} is no log of a training ({type(error).__name__}: {error}).") from error
    gpus, num_processes = (header.get("hardware") or {}).get("gpus") or [], header.get("num_processes", 1)
    if column.training == "memory_gib" and not gpus:
        return None  # a process's memory is no GPU's
    value = hours if column.training == "hours" else memory_gib * MIB_PER_GIB
    machine = machine_of({"hardware": {**(header.get("hardware") or {}), "gpus": gpus[:1] * num_processes}})
    return Cost(value, log, machine)
