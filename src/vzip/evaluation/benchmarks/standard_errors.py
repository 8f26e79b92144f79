"""Standard errors: those lmms-eval does not give, and those it gives as if all questions were independent although
several are about one image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vzip.results.score_units import Units, units_of
from vzip.results.stats import bootstrap_standard_error, clustered_standard_error, standard_error


def complete(metrics: dict[str, dict[str, Any]], primary: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds standard errors to a record's metrics and, where the primary one is ``a+b``, that sum.

    ``standard_error_source`` becomes "binomial" or "mean" (independent questions, right or wrong or in between),
    "clustered" (a mean, questions about one image together) or "bootstrap" (anything else, by clusters). Questions
    that are all about one image have none.

    Args:
        metrics: by name: ``value``, ``standard_error``, ``standard_error_source``; changed in place.
        primary: the metric that counts.
        rows: of ``samples.jsonl``, this task's.
    """
    for metric, entry in metrics.items():
        units = units_of(metric, rows)
        if units is None or not units.gives(entry["value"]):
            continue
        if entry["standard_error"] is None or units.is_clustered:
            entry["standard_error"], entry["standard_error_source"] = _standard_error(units)
    parts = primary.split("+")
    if len(parts) > 1 and all(part in metrics for part in parts):
        errors = [metrics[part]["standard_error"] for part in parts]
        sources = {metrics[part]["standard_error_source"] for part in parts}
        metrics[primary] = {
            "value": sum(metrics[part]["value"] for part in parts),
            # The parts are scores of different questions, so their errors are independent.
            "standard_error": None if None in errors else math.hypot(*errors),
            "standard_error_source": sources.pop() if len(sources) == 1 else None,
        }


def by_group(primary: str, value: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The primary metric over the questions of each group, by the group's name; numbers ascending.

    Args:
        primary: the metric.
        value: over all questions, which the units must give.
        rows: of ``samples.jsonl``, this task's; those with a ``group`` count.

    Returns:
        ``value``, ``standard_error``, ``standard_error_source`` and ``num_samples`` of each; empty where the form of
        the scores is not known.
    """
    whole = units_of(primary, rows)
    if whole is None or not whole.gives(value):
        return {}
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "group" in row:
            groups.setdefault(row["group"], []).append(row)
    if all(isinstance(name, int | float) for name in groups):
        groups = dict(sorted(groups.items()))
    found = {}
    for name, of_group in groups.items():
        units = units_of(primary, of_group)
        assert units is not None
        error, source = _standard_error(units)
        found[str(name)] = {
            "value": units.score,
            "standard_error": error,
            "standard_error_source": source,
            "num_samples": len(of_group),
        }
    return found


def _standard_error(units: Units) -> tuple[float, str] | tuple[None, None]:
    if len(set(units.clusters)) < 2:
        return None, None
    if units.aggregate is not None:
        values, aggregate = units.by_cluster()
        assert aggregate is not None
        return bootstrap_standard_error(values, aggregate), "bootstrap"
    if units.is_clustered:
        return clustered_standard_error(units.values, units.clusters), "clustered"
    if units.correct is None:
        return standard_error(units.values), "mean"
    return float(np.std(units.values)) / math.sqrt(len(units.values)), "binomial"
