"""Any two records beside each other: scores, paired statistics where both answered the same questions, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vzip.errors import ManifestError
from vzip.results.averages import Share, average_retention, recovered_share
from vzip.results.layout import Layout, Piece
from vzip.results.paired import UNPAIRED, Paired, compare_task
from vzip.results.record import Run, Score, answers_of, metrics_of, score_of

# What says how a run was made; the rest of a record is its result.
_SETTINGS = (
    "config",
    "requested_tasks",
    "seed",
    "limit",
    "batch_size",
    "gen_kwargs",
    "system_prompt",
    "model",
    "compressor",
    "pruner",
    "data",
    "code",
    "versions",
    "hardware",
)
_NO_SETTINGS = ("config.paths.run_dir", "config.overwrite", "model.num_parameters")
_HEAD = ("task", "metric", "A", "± s.e.", "B", "± s.e.", "A - B", "A / B %", "95 %", "only B", "only A", "p", "same")
_LEGEND = (
    "95 %: of A / B, by a bootstrap over the questions of both runs; bold where it leaves out 100 and McNemar's test,"
    " where answers are right or wrong, gives p < 0.05; each line is judged for itself",
    "only B, only A: questions that only that run answered rightly; p: McNemar's exact test; same: answers that are the"
    " same, in percent",
)


@dataclass(frozen=True)
class TaskPair:
    """One metric of a task that both records have.

    Attributes:
        task, metric: lmms-eval's names.
        ours, other: the scores, in the benchmark's own unit.
        paired: retention of ours against the other; None where the other scored 0.
        unpaired_because: why the questions could not be matched, or None.
    """

    task: str
    metric: str
    ours: Score
    other: Score
    paired: Paired | None
    unpaired_because: str | None = None


def compare_runs(run: Run, other: Run) -> list[TaskPair]:
    """Every metric that both records have, each task's primary metric first.

    Raises:
        ManifestError: they share no metric.
    """
    pairs = [
        _pair(run, other, task, metric)
        for task in run.record["tasks"]
        for metric in metrics_of(run.record, task)
        if score_of(other.record, task, metric) is not None
    ]
    if not pairs:
        raise ManifestError(
            f"{run.path} has the tasks {', '.join(run.record['tasks'])}, {other.path} has"
            f" {', '.join(other.record['tasks'])}: no metric stands in both, so there is nothing to compare."
        )
    return pairs


def _pair(run: Run, other: Run, task: str, metric: str) -> TaskPair:
    ours, theirs = score_of(run.record, task, metric), score_of(other.record, task, metric)
    assert ours is not None and theirs is not None
    records = (run.record, other.record, task, metric)
    try:
        return TaskPair(
            task, metric, ours, theirs, compare_task(*records, answers_of(run, task), answers_of(other, task))
        )
    except ManifestError as error:  # other questions: two independent samples of the benchmark
        return TaskPair(task, metric, ours, theirs, compare_task(*records), str(error))


def differing_settings(record: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that are not the same: name with dots, value here, value there; None where a record lacks it."""
    ours, theirs = dict(_flat(record)), dict(_flat(other))
    names = [name for name in {**ours, **theirs} if name not in _NO_SETTINGS]
    return [(name, ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)]


def pillow_remarks(record: Mapping[str, Any], other: Mapping[str, Any], which: str) -> list[str]:
    """What to say of two records whose images were resized by different Pillows; nothing if they were not.

    Pillow 12.3 and 13.0 differ by up to 0.128 in normalised pixel values (bicubic, shrinking), so scores can move.
    """
    versions = [(one.get("versions") or {}).get("pillow") for one in (record, other)]
    if versions[0] == versions[1]:
        return []
    told = " and ".join(version or "an unrecorded version" for version in versions)
    return [f"{which}: images resized by Pillow {told}; versions can resize differently, so scores may differ by that"]


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    def walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from walk(f"{name}.{key}", inner)
        else:
            yield name, value

    for name in _SETTINGS:
        yield from walk(name, record.get(name))


def lay_out_pair(run: Run, other: Run, vanilla: Run | None = None) -> Layout:
    """The comparison as a table, with what differs in the settings and what is provisional below it.

    Args:
        run, other: A and B.
        vanilla: the uncompressed run of their model, to tell how much of B's loss A wins back.

    Raises:
        ManifestError: as ``compare_runs``.
    """
    pairs = compare_runs(run, other)
    tasks = list(dict.fromkeys(pair.task for pair in pairs))
    blocks = tuple(tuple(_line(pair) for pair in pairs if pair.task == task) for task in tasks)
    remarks = [f"A: {run.path}", f"B: {other.path}", *_LEGEND]
    first = [next(pair.paired for pair in pairs if pair.task == task) for task in tasks]
    paired = [pair for pair in first if pair is not None and pair.is_paired]
    if len(tasks) > 1 and len(paired) == len(tasks):
        blocks += ((_line_of_average(average_retention(paired)),),)
        remarks.append("average: over the tasks, of A / B of each one's first metric")
    if vanilla is not None and vanilla.path.resolve() not in (run.path.resolve(), other.path.resolve()):
        remarks.append(_won_back(run, other, vanilla))
    if any(pair.paired is not None and pair.paired.low is not None and not pair.paired.is_paired for pair in pairs):
        remarks.append(UNPAIRED)
    remarks += dict.fromkeys(pair.unpaired_because for pair in pairs if pair.unpaired_because is not None)
    for name, record, reference in (("A", run.record, other.record), ("B", other.record, run.record)):
        only = [task for task in record["tasks"] if task not in reference["tasks"]]
        remarks += [f"in {name} only: {', '.join(only)}"] if only else []
        remarks += [f"{name} is provisional: {reason}" for reason in record.get("provisional_reasons", ())]
    remarks += pillow_remarks(run.record, other.record, "A and B")
    differing = differing_settings(run.record, other.record)
    remarks += ["settings that differ (A | B):" if differing else "all settings are the same"]
    remarks += [f"  {name}: {_short(ours)} | {_short(theirs)}" for name, ours, theirs in differing]
    return Layout("A against B", _HEAD, blocks, tuple(remarks), left=frozenset({0, 1}))


def _line(pair: TaskPair) -> tuple[Piece, ...]:
    ours, other, paired = pair.ours, pair.other, pair.paired
    texts = [
        pair.task,
        pair.metric,
        f"{ours.value:.4g}",
        _number(ours.standard_error),
        f"{other.value:.4g}",
        _number(other.standard_error),
        f"{ours.value - other.value:+.3g}",
    ]
    if paired is None:
        return tuple(Piece(text) for text in [*texts, *[""] * (len(_HEAD) - len(texts))])
    mark = "" if paired.is_paired else " ~"
    interval = "" if paired.low is None or paired.high is None else f"{100 * paired.low:.1f} to {100 * paired.high:.1f}"
    ratio = Piece(f"{100 * paired.retention:.1f}", paired.outside_noise)
    rest = [
        interval + (mark if interval else ""),
        *("" if count is None else str(count) for count in (paired.num_lost, paired.num_gained)),
        _number(paired.p_value),
        "" if paired.agreement is None else f"{100 * paired.agreement:.1f}",
    ]
    return (*(Piece(text) for text in texts), ratio, *(Piece(text) for text in rest))


def _line_of_average(average: Share) -> tuple[Piece, ...]:
    ratio = Piece(
        f"{100 * average.point:.1f}",
        average.low is not None and average.high is not None and not average.low <= 1 <= average.high,
    )
    cells = {"task": Piece("average"), "A / B %": ratio, "95 %": Piece(_percent(average))}
    return tuple(cells.get(name, Piece()) for name in _HEAD)


def _won_back(run: Run, other: Run, vanilla: Run) -> str:
    shared = [task for task in run.record["tasks"] if task in other.record["tasks"]]
    both = [(_against(run, vanilla, task), _against(other, vanilla, task)) for task in shared]
    known = [(ours, before) for ours, before in both if ours is not None and before is not None]
    share = recovered_share([ours for ours, _ in known], [before for _, before in known])
    if share is None or len(known) < len(shared):
        return (
            f"how much of B's loss against vanilla ({vanilla.path}) A has won back cannot be told: B loses nothing"
            " outside the noise, or the three did not answer the same questions"
        )
    return (
        f"of what B loses against vanilla ({vanilla.path}), averaged over the tasks, A has {100 * share.point:.0f} %"
        f" [{_percent(share, 0)}] back"
    )


def _against(run: Run, vanilla: Run, task: str) -> Paired | None:
    if task not in vanilla.record["tasks"]:
        return None
    return _pair(run, vanilla, task, metrics_of(run.record, task)[0]).paired


def _percent(share: Share, digits: int = 1) -> str:
    return (
        ""
        if share.low is None or share.high is None
        else f"{100 * share.low:.{digits}f} to {100 * share.high:.{digits}f}"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _short(value: Any, longest: int = 60) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
