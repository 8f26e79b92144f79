"""Which questions are answered together, and in which order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def plan_batches(lengths: Sequence[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Puts the questions of each group into batches, the longest first.

    So questions of like length share a batch, which spares padding, and what does not fit the memory shows at the
    beginning. The plan depends on nothing but its arguments: an interrupted run, and each of several processes, cuts
    the questions into the very batches of one process in one go, and so computes the very numbers.

    Args:
        lengths: of each question, in any unit.
        groups: of each question; only questions of one group may share a batch.
        batch_size: questions in a batch, at most.

    Returns:
        for each batch the positions of its questions; equal lengths keep their order.
    """
    of_group: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        of_group.setdefault(group, []).append(position)
    batches = []
    for positions in of_group.values():
        ordered = sorted(positions, key=lambda position: -lengths[position])
        batches += cut(ordered, batch_size)
    return batches


def cut(positions: Sequence[int], size: int) -> list[list[int]]:
    """A sequence in pieces of ``size``; the last may be smaller."""
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]
