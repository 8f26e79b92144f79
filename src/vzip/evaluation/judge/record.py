"""A judge's verdicts on the answers of a finished run, written into the run's own record.

Everything is matched by task and ``doc_id``; the order of ``samples.jsonl`` means nothing.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, ManifestError, RunExistsError, nearest
from vzip.evaluation.benchmarks.judge_prompts import JudgePrompt
from vzip.evaluation.benchmarks.judged import JUDGED_TASKS, JudgedTask, judged_task
from vzip.results.files import write_json, write_jsonl
from vzip.results.record import SAMPLES_NAME, check_answers, read_record, read_samples, record_path
from vzip.results.score_units import Units, units_of
from vzip.results.stats import bootstrap_standard_error, clustered_standard_error

from .settings import JudgeSettings

if TYPE_CHECKING:
    from .client import Reply

_REASON = "judge: "  # how the judge's own reasons for a provisional record begin

Row = dict[str, Any]


@dataclass
class JudgedRun:
    """A run and its answers.

    Attributes:
        path: its ``run.json``.
        record: what that says.
        rows: its answers by task.
        tasks: those to be judged.
    """

    path: Path
    record: dict[str, Any]
    rows: dict[str, list[Row]]
    tasks: list[str]

    def questions(self, tasks: Sequence[str]) -> list[Row]:
        """The answers of some of the tasks, one a question."""
        return [row for task in tasks for row in self.rows[task] if row["filter_index"] == 0]


def read_run(run: str | Path, tasks: Sequence[str] | None = None) -> JudgedRun:
    """Reads a run.

    Args:
        run: its directory.
        tasks: which to judge; by default those of its tasks that are meant for a judge.

    Raises:
        ManifestError: no record, no answers, or a question twice.
        ConfigError: a task that the run does not have, or none to judge.
    """
    record, rows = read_record(run), read_samples(run)
    chosen = [task for task in record["tasks"] if task in JUDGED_TASKS] if tasks is None else list(tasks)
    if repeated_tasks := sorted({task for task in chosen if chosen.count(task) > 1}):
        raise ConfigError(f"--tasks: {', '.join(repeated_tasks)} named more than once. Name each once.")
    for task in chosen:
        if task not in rows:
            raise ConfigError(f"--tasks {task}: not in this run{nearest(task, rows)}; it has {', '.join(rows)}.")
    if not chosen:
        raise ConfigError(
            f"{run}: none of its tasks ({', '.join(rows)}) is scored by this judge; {', '.join(JUDGED_TASKS)} are. Name"
            " others with open questions by --tasks."
        )
    for task in chosen:
        kinds: dict[str, type] = {"doc_id": object, "filter_index": int, "question": str, "scores": dict}
        check_answers(record_path(run), rows[task], kinds | {"target": object, "answer": object})
    judged = JudgedRun(record_path(run), record, rows, chosen)
    times = Counter((row["task"], row["doc_id"]) for row in judged.questions(chosen))
    repeated = [key for key, number in times.items() if number > 1]
    if repeated:
        raise ManifestError(
            f"{judged.path.with_name(SAMPLES_NAME)}: question {repeated[0]} stands there more than once."
        )
    return judged


def open_tasks(run: JudgedRun, settings: Mapping[JudgedTask, JudgeSettings], *, overwrite: bool) -> list[str]:
    """The tasks of a run that are left to be judged: without verdicts, or with some missing by the same judge.

    Args:
        run: with the tasks asked for.
        settings: of the judge of each kind of task.
        overwrite: judge all of them again.

    Raises:
        RunExistsError: verdicts of another judge would be replaced, or nothing is left to be judged.
    """
    left = []
    for task in run.tasks:
        kind, old = judged_task(task), run.record.get("judge", {}).get(task)
        same = old is not None and all(old[k] == v for k, v in _identity(settings[kind], kind.prompt).items())
        if old is not None and not same and not overwrite:
            raise RunExistsError(_judged_before(run, task, old))
        if overwrite or old is None or old["num_unusable"]:
            left.append(task)
    if not left:
        task = run.tasks[0]
        raise RunExistsError(_judged_before(run, task, run.record["judge"][task]))
    return left


def _judged_before(run: JudgedRun, task: str, old: Mapping[str, Any]) -> str:
    return (
        f"{run.path}: {task} was already judged by {old['model']} with {old['prompt']} (temperature"
        f" {old['temperature']}). Nothing was changed. To replace that, add --overwrite; to judge others, name them by"
        " --tasks."
    )


def write_verdicts(
    run: JudgedRun, tasks: Sequence[str], replies: Sequence[Reply], settings: JudgeSettings, prompt: JudgePrompt
) -> None:
    """Writes verdicts into ``samples.jsonl`` and ``run.json``, each file whole or not at all.

    Args:
        run: changed in place.
        tasks: which were judged.
        replies: one for each of ``run.questions(tasks)``, in that order.
        settings, prompt: whose.
    """
    for row, reply in zip(run.questions(tasks), replies, strict=True):
        _judge_row(row, reply, judged_task(row["task"]))
    reasons = [reason for reason in run.record["provisional_reasons"] if not reason.startswith(_REASON)]
    for task in tasks:
        kind = judged_task(task)
        of_task = [row for row in run.rows[task] if row["filter_index"] == 0]
        entry = _summary(run.record["tasks"][task], of_task, kind.metrics)
        if task in JUDGED_TASKS:
            run.record["tasks"][task] |= {
                "primary_metric": kind.metrics[0] if entry["num_judged"] else None,
                "unit": kind.unit,
            }
        run.record.setdefault("judge", {})[task] = _identity(settings, prompt) | entry
    for task, entry in run.record["judge"].items():
        if entry["num_unusable"]:
            of = run.record["tasks"][task]["num_samples"]
            reasons.append(f"{_REASON}{entry['num_unusable']} of {of} answers of {task} have no usable verdict")
    run.record["provisional_reasons"], run.record["provisional"] = reasons, bool(reasons)
    write_jsonl(run.path.with_name(SAMPLES_NAME), (row for rows in run.rows.values() for row in rows))
    write_json(run.path, run.record)


def unusable(run: JudgedRun, task: str) -> list[str]:
    """The questions without a usable verdict, by the data set's own id, each with the reason."""
    return [
        f"{row.get('question_id', row['doc_id'])}: {row['judge']['problem']}"
        for row in run.rows[task]
        if row["filter_index"] == 0 and row["judge"]["problem"] is not None
    ]


def _identity(settings: JudgeSettings, prompt: JudgePrompt) -> dict[str, Any]:
    return {**asdict(settings), "prompt": f"{prompt.name}_v{prompt.version}", "prompt_sha256": prompt.sha256}


def _judge_row(row: Row, reply: Reply, kind: JudgedTask) -> None:
    """A question without a usable verdict has no judge's score: it is neither right nor wrong."""
    row["judge"] = {"reply": reply.text, "model": reply.served_model, "problem": reply.problem}
    for metric in kind.metrics:
        row["scores"].pop(metric, None)
    if reply.problem is None:
        row["scores"] |= kind.read(reply.text) or {}


def _summary(task: dict[str, Any], rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Puts the judge's metrics into the record's entry of a task; returns what is said of the judging."""
    for metric in metrics:
        task["metrics"].pop(metric, None)
        units = units_of(metric, rows)
        if units is not None:
            error = _standard_error(units)
            task["metrics"][metric] = {
                "value": units.score,
                "standard_error": error if math.isfinite(error) else None,
                "standard_error_source": "clustered" if math.isfinite(error) else None,
            }
    judged = [row for row in rows if metrics[0] in row["scores"]]
    return {
        "served_models": dict(Counter(str(row["judge"]["model"]) for row in judged)),
        "judged": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "num_judged": len(judged),
        "num_unusable": len(rows) - len(judged),
    }


def _standard_error(units: Units) -> float:
    """Questions about one image or video together: MSVD-QA has 26 of each. NaN where there is only one."""
    if units.aggregate is None:
        return clustered_standard_error(units.values, units.clusters)
    values, aggregate = units.by_cluster()
    return bootstrap_standard_error(values, aggregate) if aggregate and len(values) > 1 else math.nan
