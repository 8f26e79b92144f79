"""What the page shows of one or two runs, as plain values: samples, scores of tasks and categories, remarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.errors import ManifestError
from vzip.results.paired import compare_units, lost_and_gained, same_answers
from vzip.results.record import Run, check_answers, is_vanilla, metrics_of, read_samples, score_of, title_of
from vzip.results.score_units import units_of

Row = Mapping[str, Any]
Rows = Sequence[Row]
# What the scores of lmms-eval's tasks call the kind of a question, the first that is there.
_CATEGORIES = ("category", "l2_category", "l2-category", "split", "subfield", "task_type", "sub_task")


@dataclass(frozen=True)
class TaskRows:
    """A task's answers that both runs gave to the same questions, in one order; of one run all it gave.

    Attributes:
        name: lmms-eval's.
        rows: of each run, matched.
        whole: of each run all its answers.
    """

    name: str
    rows: tuple[Rows, ...]
    whole: tuple[Rows, ...]


def read_tasks(run: Run, other: Run | None) -> tuple[list[TaskRows], list[str]]:
    """The answers of a run, or of two as far as they answered the same questions, and what to say of the others.

    Questions are the same where task, id, text and target are.

    Raises:
        ManifestError: answers that were not kept or are damaged; two runs with no question in common.
    """
    answers = [_answers(one) for one in (run, other) if one is not None]
    if other is None:
        return [TaskRows(task, (rows,), (rows,)) for task, rows in answers[0].items()], []
    ours, theirs = answers
    names = names_of([run, other])
    found, remarks = [], []
    for task in (task for task in ours if task in theirs):
        by_id = {_key(row): row for row in theirs[task]}
        pairs = [(row, by_id[_key(row)]) for row in ours[task] if _key(row) in by_id]
        same = [(a, b) for a, b in pairs if (a["question"], a["target"]) == (b["question"], b["target"])]
        # In the order of ``paired.match``, by which the bootstrap of `compare` draws.
        same.sort(
            key=lambda pair: (isinstance(pair[0]["doc_id"], str), pair[0]["doc_id"], pair[0].get("filter_index", 0))
        )
        if same:
            rows = ([a for a, _ in same], [b for _, b in same])
            found.append(TaskRows(task, rows, (ours[task], theirs[task])))
        if len(same) < max(len(ours[task]), len(theirs[task])):
            differ = f", {len(pairs) - len(same)} have another text or target" if len(same) < len(pairs) else ""
            remarks.append(
                f"{task}: {len(same)} questions are in both runs and compared; {names[0]} has {len(ours[task])},"
                f" {names[1]} {len(theirs[task])}{differ}."
            )
    for name, have, lack in ((names[0], ours, theirs), (names[1], theirs, ours)):
        if alone := [task for task in have if task not in lack]:
            remarks.append(f"Only {name} has the tasks {', '.join(alone)}; they are left out.")
    if not found:
        raise ManifestError(
            f"{run.path} answered {_told(ours)}, {other.path} {_told(theirs)}: no question is in both, so there is"
            " nothing to compare. Evaluate both on the same tasks, or view one run alone."
        )
    return found, remarks


def _answers(run: Run) -> dict[str, list[dict[str, Any]]]:
    answers = read_samples(run.path)
    for task, rows in answers.items():
        check_answers(run.path, rows, {"doc_id": object, "question": object, "target": object, "answer": object})
        check_answers(run.path, rows, {"scores": dict})
        if wrong := next((row for row in rows if not isinstance(row["doc_id"], int | str)), None):
            raise ManifestError(f"{run.path}: {task}: doc_id {wrong['doc_id']!r:.60} is no number and no text.")
        if len({_key(row) for row in rows}) < len(rows):
            raise ManifestError(f"{run.path}: {task}: a question id stands more than once in samples.jsonl.")
    if not answers:
        raise ManifestError(f"{run.path}: its samples.jsonl holds no answer.")
    asked = [task for task in run.record["tasks"] if task in answers]
    return {task: answers[task] for task in dict.fromkeys([*asked, *answers])}


def _key(row: Row) -> tuple[str, Any]:
    return str(row["doc_id"]), row.get("filter_index", 0)


def _told(answers: Mapping[str, Rows]) -> str:
    return ", ".join(f"{task} ({len(rows)} questions)" for task, rows in answers.items())


def build_content(run: Run, other: Run | None, tasks: Sequence[TaskRows], remarks: Sequence[str]) -> dict[str, Any]:
    """The page's content without pictures, for ``page.render``.

    Args:
        run, other: A and B; None: one run alone.
        tasks, remarks: from ``read_tasks``.

    Returns:
        ``runs``, ``base`` (which of them the others are held against: vanilla if one is), ``tasks``, ``samples`` and
        ``remarks``; ``views`` of each sample are empty.
    """
    runs = [one for one in (run, other) if one is not None]
    base, names = _base(runs), names_of(runs)
    return {
        "runs": [_run_entry(one, name) for one, name in zip(runs, names, strict=True)],
        "base": base,
        "tasks": [_task_entry(runs, task, base) for task in tasks],
        "samples": [sample for task in tasks for sample in _samples(runs, task, base)],
        "images": [],
        "remarks": [
            *remarks,
            *(
                why if other is None else f"{name}: {why}"
                for one, name in zip(runs, names, strict=True)
                for why in _provisional(one)
            ),
        ],
    }


def _base(runs: Sequence[Run]) -> int:
    vanilla = [number for number, one in enumerate(runs) if is_vanilla(one.record)]
    return vanilla[0] if len(vanilla) == 1 else len(runs) - 1


def names_of(runs: Sequence[Run]) -> list[str]:
    """What each is called in a few letters: vanilla and compressed where one of two is vanilla, else A and B."""
    if len(runs) == 1:
        return ["answer"]
    vanilla = [is_vanilla(one.record) for one in runs]
    return ["vanilla" if own else "compressed" for own in vanilla] if sum(vanilla) == 1 else ["A", "B"]


def _provisional(run: Run) -> list[str]:
    return [f"provisional: {why}" for why in run.record.get("provisional_reasons") or []]


def _run_entry(run: Run, name: str) -> dict[str, Any]:
    record = run.record
    pruner = record.get("pruner")
    return {
        "name": name,
        "title": title_of(record),
        "path": str(run.path.parent),
        "created": record.get("created"),
        "compressor": record["compressor"].get("settings") or record["compressor"]["name"],
        "pruner": pruner and (pruner.get("settings") or pruner["name"]),
    }


def _task_entry(runs: Sequence[Run], task: TaskRows, base: int) -> dict[str, Any]:
    """A task's scores and those of its categories, by its primary metric."""
    metric = _metric(runs, task)
    entry = runs[0].record["tasks"].get(task.name) or {}
    labels = [category_of(row) for row in task.rows[0]]
    names = sorted({label for label in labels if label})
    groups = [_group(runs, task, metric, base, None)]
    if len(names) > 1:
        groups += [_group(runs, task, metric, base, name) for name in names]
    return {"name": task.name, "metric": metric, "unit": entry.get("unit"), "groups": groups}


def _metric(runs: Sequence[Run], task: TaskRows) -> str | None:
    """The first metric of the task whose units are understood in all runs: they give the number of the record."""
    for metric in metrics_of(runs[0].record, task.name) if task.name in runs[0].record["tasks"] else ():
        scores = [score_of(one.record, task.name, metric) for one in runs]
        units = [units_of(metric, rows) for rows in task.whole]
        if all(
            own is not None and score is not None and own.gives(score.value)
            for own, score in zip(units, scores, strict=True)
        ):
            return metric
    return None


def _group(runs: Sequence[Run], task: TaskRows, metric: str | None, base: int, category: str | None) -> dict[str, Any]:
    """Scores of some of a task's questions, and how the two runs differ on them."""
    chosen = [category is None or category_of(row) == category for row in task.rows[0]]
    rows = [[row for row, belongs in zip(own, chosen, strict=True) if belongs] for own in task.rows]
    units = [None if metric is None else units_of(metric, own) for own in rows]
    group: dict[str, Any] = {
        "category": category,
        "num_questions": len(rows[0]),
        "scores": [None if own is None else _finite(own.score) for own in units],
    }
    if len(runs) == 1:
        return group
    group["same"] = sum(same_answers(*rows)) / len(rows[0])
    ours, theirs = units[1 - base], units[base]
    paired = None
    right = _right(_scores(runs, task, rows[1 - base])), _right(_scores(runs, task, rows[base]))
    if ours is not None and theirs is not None and (ours.keys, ours.clusters) == (theirs.keys, theirs.clusters):
        if ours.correct is not None and theirs.correct is not None:
            right = ours.correct, theirs.correct
        if theirs.score and len(ours.keys) > 1:
            paired = compare_units(ours, theirs, task.name)
    p_value = None
    if right[0] is not None and right[1] is not None:  # of MME, which scores pairs, question by question
        lost, gained, p_value = lost_and_gained(right[0], right[1])
        group |= {"lost": lost, "gained": gained, "p": p_value}
    if paired is not None:
        group["retention"] = [_finite(value) for value in (paired.retention, paired.low, paired.high)]
        group["outside_noise"] = replace(paired, p_value=p_value).outside_noise
    return group


def _right(scores: Sequence[float | None]) -> NDArray[np.bool_] | None:
    """Which answers are right; None where they are graded, or some are not scored."""
    return np.array(scores) == 1 if all(score in (0, 1) for score in scores) else None


def _scores(runs: Sequence[Run], task: TaskRows, rows: Rows) -> list[float | None]:
    record = runs[0].record
    return question_scores(metrics_of(record, task.name) if task.name in record["tasks"] else [], rows)


def _samples(runs: Sequence[Run], task: TaskRows, base: int) -> list[dict[str, Any]]:
    scores = [_scores(runs, task, rows) for rows in task.rows]
    same = same_answers(*task.rows) if len(task.rows) == 2 else [True] * len(task.rows[0])
    samples = []
    for number, rows in enumerate(zip(*task.rows, strict=True)):
        own = [scores[which][number] for which in range(len(rows))]
        first = rows[0]
        filtered = first.get("filter_index", 0)
        samples.append(
            {
                "key": f"{task.name}:{first['doc_id']}" + (f":{filtered}" if filtered else ""),
                "task": task.name,
                "id": str(first.get("question_id", first["doc_id"])),
                "category": category_of(first),
                "question": _text(first["question"]),
                "target": _text(first["target"]),
                "answers": [_text(row["answer"]) for row in rows],
                "scores": own,
                "outcome": outcome_of(own, base),
                "same": same[number],
                "num_tokens": [_counts(row.get("num_visual_tokens")) for row in rows],
                "views": [],
                "note": "",
            }
        )
    return samples


def outcome_of(scores: Sequence[float | None], base: int) -> str:
    """``lost``: only the base's answer is right, or it scores more; ``gained``: the other's does; ``right``, ``wrong``:
    they score the same, and more than 0 or not. Empty where a score is not known. Of one run ``right`` or ``wrong``."""
    if any(score is None for score in scores):
        return ""
    known = [score for score in scores if score is not None]
    ours, theirs = known[len(known) - 1 - base], known[base]
    if ours != theirs:
        return "lost" if theirs > ours else "gained"
    return "right" if ours > 0 else "wrong"


def question_scores(metrics: Sequence[str], rows: Rows) -> list[float | None]:
    """The score of each answer by itself: 1 or 0 where answers are right or wrong, else as the benchmark grades it.

    By the first metric that has a score for each question; of those that count several questions as one (MME's pairs),
    what the task wrote beside the answer.
    """
    for metric in metrics:
        units = units_of(metric, rows)
        if units is None:
            continue
        has = [any(part in row["scores"] for part in metric.split("+")) for row in rows]
        values = units.correct if units.correct is not None else units.values
        if values.ndim == 1 and len(values) == sum(has) and len(units.keys) == len(values):
            given = iter(values.tolist())
            return [_finite(float(next(given))) if there else None for there in has]
    return [_entry_score(row["scores"]) for row in rows]


def _entry_score(scores: Mapping[str, Any]) -> float | None:
    for entry in scores.values():
        found = [entry.get(key) for key in ("hit", "score")] if isinstance(entry, Mapping) else [entry]
        for value in found:
            if isinstance(value, bool | int | float):
                return _finite(float(value))
    return None


def category_of(row: Row) -> str:
    """The kind of a question as the data calls it; empty where it does not."""
    if row.get("group") is not None:
        return str(row["group"])
    entries = [entry for entry in row["scores"].values() if isinstance(entry, Mapping)]
    for key in _CATEGORIES:
        for entry in entries:
            if isinstance(entry.get(key), str | int) and entry[key] != "":
                return str(entry[key])
    return ""


def _counts(value: Any) -> list[int]:
    return [count for count in value if isinstance(count, int)] if isinstance(value, list) else []


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_text(one) for one in value)
    return value if isinstance(value, str) else "" if value is None else str(value)
