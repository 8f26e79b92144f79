"""Reading a run's record (``run.json``) and its answers (``samples.jsonl``).

Fields of a record: ``schema_version``, ``kind``, ``created``, ``config`` (resolved, or null), ``requested_tasks``,
``seed``, ``limit``, ``batch_size``, ``gen_kwargs``, ``include_path``, ``system_prompt``, ``model``, ``compressor``,
``visual_tokens`` (budget per crop, measured least and most), ``pruner`` (null, or name, settings and, measured:
``schedule``, the visual tokens of an image that each layer attended to, its average, and ``cache_lengths``, the tokens
that each layer held after the prompt; least and most), ``tasks`` (by name: ``primary_metric``, ``unit``,
``chance``, ``num_samples``, ``metrics`` by name: ``value``, ``standard_error``, ``standard_error_source``;
``protocol``: task file, split, prompt, judge, difference from what is published, generation settings; where the score
is told by groups, as a video's length, ``grouped_by`` and ``groups`` by name: the primary metric), ``data``
(by task: path, revision or file digests, digest of the questions), ``code`` (commit, dirty), ``versions``,
``hardware``, ``wall_time_s``, ``answering_time_s`` (of the first process, without lmms-eval's loading and scoring),
``num_processes``, ``batch_sizes`` (size -> how many batches), ``tower_cache`` (crops taken from it or run, or null),
``visual_cache`` (images and videos encoded, and shown by questions, of the first process), ``num_resumed_answers``,
``num_damaged_lines``, ``left_out`` (questions whose image or video cannot be read), ``peak_memory_gib``,
``provisional``, ``provisional_reasons``; and once ``python -m vzip judge`` was there, ``judge`` (by task: whom it
asked what, and of how many answers a verdict came).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vzip.errors import ManifestError
from vzip.json_files import read_json, read_json_lines

RECORD_NAME = "run.json"
SAMPLES_NAME = "samples.jsonl"
SCHEMA_VERSION = 1
# What a judge model adds to a task: the share of answers that it calls right, and the mean of its scores.
JUDGE_ACCURACY, JUDGE_SCORE = "judge_accuracy", "judge_score"
# What makes two judgements comparable.
_OF_JUDGE = ("model", "base_url", "temperature", "max_tokens", "prompt_sha256")
# What makes two runs runs of one model.
_OF_MODEL = ("name_or_path", "revision", "weights_sha256", "class", "dtype", "preprocess")
_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
_REQUIRED = ("schema_version", "model", "compressor", "visual_tokens", "tasks", "provisional")


# Weights on top of the model, as a title names them.
_ON_TOP = {"projector": "tuned projector", "adapter_path": "LoRA adapter"}


@dataclass(frozen=True)
class Run:
    """A finished evaluation: its ``run.json`` and what it says."""

    path: Path
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """One number of a record.

    Attributes:
        value: as lmms-eval gave it.
        standard_error: in the same unit, or None.
        num_samples: questions behind it.
    """

    value: float
    standard_error: float | None
    num_samples: int


def record_path(run: str | Path) -> Path:
    """``run.json`` of a run directory; a path to the file itself is returned as it is."""
    run = Path(run)
    return run / RECORD_NAME if run.is_dir() else run


def read_record(run: str | Path) -> dict[str, Any]:
    """Reads and checks a record.

    Args:
        run: a run directory or the path of its ``run.json``.

    Raises:
        ManifestError: no such file, not JSON, or not a record this version can read.
    """
    path = record_path(run)
    if not path.is_file():
        what = "holds no run.json" if Path(run).is_dir() else "does not exist"
        raise ManifestError(f"{str(run)!r} {what}: a run directory of a finished evaluation is needed.")
    try:
        record = read_json(path)
    except ValueError as error:
        raise ManifestError(f"{path} is not JSON ({error}). Run the evaluation again with overwrite=true.") from error
    missing = [key for key in _REQUIRED if key not in record] if isinstance(record, dict) else list(_REQUIRED)
    wrong = [f"it lacks {', '.join(missing)}"] if missing else list(_wrong_shapes(record))
    if wrong:
        raise ManifestError(f"{path} is not an evaluation record: {'; '.join(wrong[:5])}.")
    if record["schema_version"] != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema_version {record['schema_version']}; this version of vzip reads {SCHEMA_VERSION}."
        )
    return record


def _wrong_shapes(record: Mapping[str, Any]) -> Iterator[str]:
    """What of a record that has all its fields is of another kind than every reader of it relies on."""
    yield from _of_kind("", record, {"model": dict, "compressor": dict, "visual_tokens": dict, "tasks": dict})
    optional = {"data": dict, "judge": dict, "pruner": dict, "config": dict, "provisional_reasons": list}
    yield from _of_kind("", record, {key: kind for key, kind in optional.items() if record.get(key) is not None})
    if isinstance(record["compressor"], dict):
        yield from _of_kind("compressor.", record["compressor"], {"name": str})
    for task, entry in record["tasks"].items() if isinstance(record["tasks"], dict) else ():
        if not isinstance(entry, dict):
            yield f"tasks.{task} is {entry!r:.60}, not an object"
            continue
        yield from _of_kind(f"tasks.{task}.", entry, {"metrics": dict, "num_samples": int})
        for metric, score in entry["metrics"].items() if isinstance(entry.get("metrics"), dict) else ():
            numbers = [score.get("value"), score.get("standard_error") or 0.0] if isinstance(score, dict) else [None]
            if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
                yield f"tasks.{task}.metrics.{metric} is {score!r:.60}, which has no value or standard_error"


def _of_kind(where: str, values: Mapping[str, Any], kinds: Mapping[str, type]) -> Iterator[str]:
    for key, kind in kinds.items():
        if not isinstance(values.get(key), kind):
            yield f"{where}{key} is {values.get(key)!r:.60}, not {_KINDS[kind]}"


def find_runs(folder: Path, pattern: str = f"**/{RECORD_NAME}", unreadable: list[str] | None = None) -> list[Run]:
    """Every evaluation's record below a folder, in order of their paths.

    Args:
        folder: ``runs``, or any other.
        pattern: where below it.
        unreadable: takes the messages about files named ``run.json`` that are no records.
    """
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            found.append(Run(path, read_record(path)))
        except (OSError, ValueError) as error:  # a ManifestError, and what the system says of a neighbour
            if unreadable is not None:
                unreadable.append(str(error))
    return found


def runs_beside(run: Run) -> list[Run]:
    """The evaluations of the runs tree that a record lies in, itself among them; none where it lies elsewhere.

    Wherever they lie in it: the tree is usually ``runs/<task>/<recipe or model>/<compressor>-<budget>/seed<k>``; its
    root is told by its name, or else by the seed's, four levels below it.
    """
    above = run.path.resolve().parents
    root = next((folder for folder in above if folder.name == "runs"), None)
    if root is None and above[0].name.startswith("seed") and len(above) > 4:
        root = above[4]
    return [] if root is None else find_runs(root)


def read_samples(run: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The answers of a run by task, in order of question.

    Raises:
        ManifestError: the run has no ``samples.jsonl``, or one that is damaged.
    """
    path = record_path(run).with_name(SAMPLES_NAME)
    if not path.is_file():
        raise ManifestError(f"{path} does not exist: the answers of this run were not kept.")
    by_task: dict[str, list[dict[str, Any]]] = {}
    try:
        for row in read_json_lines(path):
            if not isinstance(row, dict) or not isinstance(row.get("task"), str):
                raise ValueError(f"an answer must be an object that names its task, this is {str(row)[:60]!r}")
            by_task.setdefault(row["task"], []).append(row)
    except ValueError as error:
        raise ManifestError(
            f"{path}: not the answers of a run ({error}). Run the evaluation again with overwrite=true."
        ) from error
    return by_task


def check_answers(path: Path, rows: Iterable[Mapping[str, Any]], kinds: Mapping[str, type]) -> None:
    """Refuses answers that lack what a reader relies on.

    Raises:
        ManifestError: naming the first of them.
    """
    for row in rows:
        wrong = [key for key, kind in kinds.items() if key not in row or not isinstance(row[key], kind)]
        if wrong:
            raise ManifestError(
                f"{path.with_name(SAMPLES_NAME)}: an answer of {row['task']} (doc_id {row.get('doc_id')}) has no usable"
                f" {', '.join(wrong)}. Run the evaluation again with overwrite=true."
            )


def answers_of(run: Run, task: str) -> list[dict[str, Any]] | None:
    """What a paired comparison needs of a task's answers; None where the run's answers were not kept."""
    if not run.path.with_name(SAMPLES_NAME).is_file():
        return None
    return _paired_fields(run.path).get(task)


@lru_cache(maxsize=2)  # a run and its vanilla run; the answers of a whole table would not fit into memory
def _paired_fields(path: Path) -> dict[str, list[dict[str, Any]]]:
    kept = ("doc_id", "filter_index", "question", "target", "answer", "scores", "cluster")
    for rows in (answers := read_samples(path)).values():
        check_answers(path, rows, {"doc_id": object, "scores": dict})
    return {task: [{key: row.get(key) for key in kept} for row in rows] for task, rows in answers.items()}


def score_of(record: Mapping[str, Any], task: str, metric: str) -> Score | None:
    """A metric of a task, ``a+b`` for a sum; None if the record does not have it.

    A sum has a standard error only where the record states one, since its parts may share questions.
    """
    entry = record["tasks"].get(task)
    if entry is None:
        return None
    metrics = entry["metrics"]
    if metric in metrics:
        return Score(metrics[metric]["value"], metrics[metric]["standard_error"], entry["num_samples"])
    parts = metric.split("+")
    if len(parts) > 1 and all(part in metrics for part in parts):
        return Score(sum(metrics[part]["value"] for part in parts), None, entry["num_samples"])
    return None


def metrics_of(record: Mapping[str, Any], task: str) -> list[str]:
    """Names of a task's metrics, its primary one first."""
    entry = record["tasks"][task]
    primary = [] if entry["primary_metric"] is None else [entry["primary_metric"]]
    return list(dict.fromkeys([*primary, *entry["metrics"]]))


def primary_scores(record: Mapping[str, Any]) -> dict[str, Score]:
    """The primary metric of every task that has one."""
    found = {}
    for task, entry in record["tasks"].items():
        score = None if entry["primary_metric"] is None else score_of(record, task, entry["primary_metric"])
        if score is not None:
            found[task] = score
    return found


def is_vanilla(record: Mapping[str, Any]) -> bool:
    """Whether a record is of the model as it is: no compression, nothing dropped in the language model."""
    return record["compressor"]["name"] == "Identity" and not record.get("pruner")


def visual_tokens_of(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Fewest and most visual tokens of an image, measured; with a pruner, on average over the layers."""
    pruner, tokens = record.get("pruner"), record["visual_tokens"]
    if pruner and pruner["average_min"] is not None:
        return round(pruner["average_min"], 1), round(pruner["average_max"], 1)
    return tokens["measured_min"], tokens["measured_max"]


def method_of(record: Mapping[str, Any]) -> str:
    """The compressor's class and, if there is one, the pruner's."""
    pruner = record.get("pruner")
    return record["compressor"]["name"] + (f"+{pruner['name']}" if pruner else "")


def title_of(record: Mapping[str, Any]) -> str:
    """What was evaluated, as a person would say it: ``"tiny + tuned projector, VisionZip, 64 tokens"``."""
    model, chosen = record["model"], (record.get("config") or {}).get("model") or {}
    path = Path(str(model.get("name_or_path") or model["class"]))
    # A directory of one's own, which has no revision, is called by its name, not by the option that reads it.
    is_published = model.get("revision") is not None or path.parent.name == "vzip"
    parts = [str(chosen.get("name") or path.name) if is_published else path.name]
    parts += [words for key, words in _ON_TOP.items() if chosen.get(key)]
    parts += [f"{chosen['quantization']} weights"] if chosen.get("quantization") else []
    parts += [f"{chosen['positions']} positions"] if chosen.get("positions") else []
    parts += [f"compiled {'+'.join(chosen['compile'])}"] if chosen.get("compile") else []
    fewest, most = visual_tokens_of(record)
    tokens = "no visual" if most is None else f"{fewest}" if fewest == most else f"{fewest} to {most}"
    pruner = record.get("pruner")
    compressor = record["compressor"]["name"]
    methods = [compressor] if compressor != "Identity" else []
    method = " + ".join([*methods, *([pruner["name"]] if pruner else [])]) or "vanilla"
    return f"{' + '.join(parts)}, {method}, {tokens} tokens" + (" (provisional)" if record["provisional"] else "")


def is_vanilla_of(candidate: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether ``candidate`` is an uncompressed run that ``record`` may be compared with."""
    return is_vanilla(candidate) and is_comparable(candidate, record)


def is_comparable(candidate: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether two runs differ in the method alone.

    The same model in the same precision and preprocessing, the same questions of every task they share (by digest), the
    same generation settings, and the same judge where both were judged.
    """
    same: list[Callable[[Mapping[str, Any]], object]] = [
        lambda r: [r["model"].get(key) for key in _OF_MODEL],
        lambda r: r.get("gen_kwargs"),
        lambda r: r.get("system_prompt"),
        lambda r: r.get("limit"),
    ]
    if any(of(candidate) != of(record) for of in same):
        return False
    shared = [task for task in record["tasks"] if task in candidate["tasks"]]
    digest = "questions_sha256"
    return bool(shared) and all(
        record["data"].get(task, {}).get(digest) == candidate["data"].get(task, {}).get(digest)
        and same_judge(record, candidate, task)
        for task in shared
    )


def same_judge(record: Mapping[str, Any], other: Mapping[str, Any], task: str) -> bool:
    """Whether a task's answers were judged alike in two records: by one judge, or not by any in one of them.

    Versions of a model that its endpoint serves under one name are different judges.
    """
    first, second = (r.get("judge", {}).get(task) for r in (record, other))
    if first is None or second is None:
        return True
    return all(first[key] == second[key] for key in _OF_JUDGE) and set(first["served_models"]) == set(
        second["served_models"]
    )


def unit_factor(unit: str | None, wanted: str, where: str) -> float:
    """What a score in ``unit`` is multiplied by to be in ``wanted``; an unknown unit is taken as the wanted one.

    Raises:
        ManifestError: units that cannot be converted; ``where`` names the number.
    """
    if unit is None or unit == wanted:
        return 1.0
    if {unit, wanted} == {"fraction", "percent"}:
        return 100.0 if wanted == "percent" else 0.01
    raise ManifestError(f"{where}: expected in {wanted}, but the record has {unit}.")
