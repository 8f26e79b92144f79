"""Runs what a leaderboard lacks: each cell's evaluation, then what every method costs, on one loaded model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vzip.config.board import VANILLA, Board, Cell
from vzip.errors import ConfigError, ManifestError, UnsupportedModelError, VzipError
from vzip.report.leaderboard_folder import FILE_NAME, Entry, mergeable, read_folder
from vzip.results.provenance import hardware
from vzip.results.record import Run, read_record, record_path
from vzip.sweep.execute import run_plan

logger = logging.getLogger(__name__)


def run_cells(
    board: Board, others: Sequence[Path] = ()
) -> tuple[list[tuple[Cell, Run]], list[tuple[str, str, str]], list[str]]:
    """Evaluates every cell that has no record yet; an interrupted one goes on where it stopped.

    Args:
        board: the cells.
        others: folders to be merged, which must be of vanilla's model and protocol; told before the other cells run.

    Returns:
        the finished cells, what is not possible (method, budget, reason), and the errors of those that failed.

    Raises:
        KeyboardInterrupt: saying what is kept.
        ManifestError: a folder that cannot be merged.
        VzipError: vanilla's own, without which nothing can be said of the others.
    """
    finished: list[tuple[Cell, Run]] = []
    missing = [(cell.method, cell.budget, cell.reason) for cell in board.cells if cell.plan is None]
    failed: list[str] = []
    todo = [cell for cell in board.cells if cell.plan is not None]
    for number, cell in enumerate(todo, 1):
        assert cell.plan is not None
        plan = cell.plan.as_it_stands_now()
        try:
            if plan.finished is None:
                logger.info("%d of %d: %s, %s", number, len(todo), cell.method, cell.budget)
                run_plan(plan)
            path = record_path(plan.evaluation["run_dir"])
            finished.append((cell, Run(path, read_record(path))))
            if cell.method == VANILLA:
                for folder in others:
                    mergeable(folder, finished[0][1].record)
        except KeyboardInterrupt as error:
            last = f"; of the one under way {error.args[0]}" if error.args else ""
            raise KeyboardInterrupt(f"{len(finished)} of {len(todo)} runs are finished and kept{last}") from error
        except (ConfigError, UnsupportedModelError) as error:  # what only the loaded model can tell
            if cell.method == VANILLA:
                raise
            missing.append((cell.method, cell.budget, str(error)))
        except VzipError as error:
            if cell.method == VANILLA:
                raise
            failed.append(f"{cell.method}, {cell.budget}: {error}")
    return finished, missing, failed


def entries_of(finished: list[tuple[Cell, Run]], out: Path, measure_anew: bool) -> tuple[list[Entry], list[str]]:
    """The finished cells with their costs: as measured before on this machine if all are, else all measured now.

    Returns:
        the entries, and why some could not be measured.
    """
    machine = machine_words()
    earlier = [] if measure_anew else earlier_entries(out)
    kept = {(e.method, e.budget): e for e in earlier if not e.origin and e.machine == machine}
    keys = [(cell.method, cell.budget) for cell, _ in finished]
    costs: Mapping[tuple[str, str], Mapping[str, Any] | None] = {key: entry.cost for key, entry in kept.items()}
    said: list[str] = []
    if not all(
        key in kept and kept[key].run.record == run.record for key, (_, run) in zip(keys, finished, strict=True)
    ):
        costs, said = _measured(finished)
    return [
        Entry(
            cell.method,
            cell.budget,
            run,
            costs.get(key),
            machine,
            cell.plan is not None and cell.plan.compressor.reads_text,
        )
        for key, (cell, run) in zip(keys, finished, strict=True)
    ], said


def machine_words() -> str:
    """What times depend on, for a remark."""
    import torch

    found = hardware()
    gpus = ", ".join(found["gpus"])
    return gpus or f"{found['cpu']}, {torch.get_num_threads()} threads"


def earlier_entries(out: Path) -> list[Entry]:
    """What an earlier leaderboard wrote there; ManifestError where it is not to be read."""
    try:
        return read_folder(out) if (out / FILE_NAME).exists() else []
    except VzipError as error:
        raise ManifestError(f"{error} Remove it, or give another --out DIR.") from error


def _measured(finished: list[tuple[Cell, Run]]) -> tuple[dict[tuple[str, str], dict[str, Any] | None], list[str]]:
    from vzip.bench.side_by_side import Cost, measure
    from vzip.models.model_cache import KEEPER

    plan = finished[0][0].plan
    assert plan is not None
    vlm = KEEPER.load(plan.model, plan.compressor, plan.tower_cache_gib, plan.pruner)
    logger.info("measuring what %d methods and budgets cost, in turns", len(finished))
    methods = {(c.method, c.budget): (c.plan.compressor, c.plan.pruner) for c, _ in finished if c.plan is not None}
    costs = measure(vlm, methods)
    said = [
        f"{method} at {budget} was not measured: {why}"
        for (method, budget), why in costs.items()
        if isinstance(why, str)
    ]
    return {key: asdict(cost) if isinstance(cost, Cost) else None for key, cost in costs.items()}, said
