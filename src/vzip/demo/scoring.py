"""How `scenes` is scored: the metrics of the benchmarks it stands in for, on plain lists of per-question results.

A result is a dict with `answer` (the right one), `said` (normalised) and `pair` (MME's twins share it). lmms-eval calls
these as aggregations, the demo on bootstrap resamples; all return percent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypedDict


class Result(TypedDict):
    """One answered question."""

    answer: str
    said: str
    pair: str


def normalise(text: str) -> str:
    """Lower case, surrounding white space and final punctuation removed."""
    return text.strip().lower().rstrip(".!,").strip()


def accuracy(results: Sequence[Result]) -> float:
    """Exact match."""
    return 100 * sum(r["said"] == r["answer"] for r in results) / len(results)


def f1(results: Sequence[Result]) -> float:
    """F1 of "yes", POPE's measure; anything but yes counts as no."""
    hits = sum(r["said"] == r["answer"] == "yes" for r in results)
    said, true = sum(r["said"] == "yes" for r in results), sum(r["answer"] == "yes" for r in results)
    return 200 * hits / (said + true) if said + true else 0.0


def mme(results: Sequence[Result]) -> float:
    """Mean of accuracy and accuracy+ (both twins right), MME's score as a share of its maximum."""
    pairs: dict[str, list[bool]] = defaultdict(list)
    for r in results:
        pairs[r["pair"]].append(r["said"] == r["answer"])
    plus = 100 * sum(all(twins) for twins in pairs.values()) / len(pairs)
    return (accuracy(results) + plus) / 2


METRICS = {"existence": f1, "attributes": accuracy, "counting": mme, "reading": accuracy}
