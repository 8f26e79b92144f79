"""What a table's rows need: the runs that they are made of, and the commands for those that are missing."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from vzip.config.build import resolved
from vzip.config.options import config_dir
from vzip.config.overrides import check_overrides
from vzip.config.run_directory import TUNED, recipe_changes, training_directory
from vzip.config.validate import TRAINED, validate
from vzip.errors import ConfigError
from vzip.installed import program
from vzip.report.costs import Bench, cost_of_bench, machine_of, took_something_over
from vzip.report.paper_tables import Column, PaperTable, Row
from vzip.report.table_fill import holds
from vzip.results.provenance import hardware
from vzip.results.record import JUDGE_ACCURACY, JUDGE_SCORE, Run

BEFORE = "{before}"  # in a training's overrides: the tuned weights of the training before it


@dataclass(frozen=True)
class Training:
    """A call of train.py that a row builds on, where its tuned weights go, and what its overrides compose to."""

    words: tuple[str, ...]
    final: Path
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Planned:
    """What one row's overrides, and the further ones of the command line, compose to.

    Attributes:
        words: the row's, for eval.py.
        config: what they compose to.
        trainings: the calls of train.py that come first, in order; the last one is what the row evaluates or tells of.
        needs_training: whether the row evaluates what they train.
    """

    words: tuple[str, ...]
    config: Mapping[str, Any]
    trainings: tuple[Training, ...] = ()
    needs_training: bool = False

    @property
    def training_directory(self) -> Path | None:
        return self.trainings[-1].final.parent if self.trainings else None


@dataclass(frozen=True)
class Todo:
    """A command that would fill cells which are blank.

    Attributes:
        label: the row it is for; several rows may want the same command.
        program: "train.py", "bench", "eval.py" or "judge".
        words: what it is given.
        config: of an evaluation: what the overrides compose to.
        tasks: of an evaluation: its benchmarks.
        waits_for: tuned weights that must be there first, or None.
        makes: tuned weights that it writes, or None.
    """

    label: str
    program: str
    words: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    waits_for: Path | None = None
    makes: Path | None = None

    @property
    def command(self) -> str:
        return shlex.join([*program(self.program.removesuffix(".py")).split(), *self.words])


def plan(table: PaperTable, words: Sequence[str], runs_dir: Path) -> dict[str, Planned]:
    """Composes every row's overrides as eval.py and train.py will.

    Raises:
        ConfigError: overrides that do not compose, or further ones that would change what a row is.
    """
    directory = config_dir()
    planned = {}
    rows = [(row, (*row.run, f"paths.runs_dir={runs_dir}")) for row in table.rows if row.run]
    for _, own in rows:  # before Hydra is set up for the rows: it can be once at a time, and this does so itself
        check_overrides([*own, *words], directory, "eval")
    with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
        for row, own in rows:
            config = resolved(compose("eval", [*own, *words]))
            validate(config)
            changes = recipe_changes(config, resolved(compose("eval", list(own)))) if words else []
            if changes:
                raise ConfigError(f"row {row.label!r} would not be the paper's any more: {'; '.join(changes)}.")
            is_trained = config["model"]["projector"] == TRAINED
            trainings = _trainings(row, is_trained, runs_dir)
            planned[row.label] = Planned(row.run, config, tuple(trainings), is_trained)
    return planned


def _trainings(row: Row, is_trained: bool, runs_dir: Path) -> Iterator[Training]:
    """The row's own, or else the one whose weights its overrides ask for."""
    before = ""
    for words in row.train or ((_train_words(row.run),) if is_trained else ()):
        filled = [word.replace(BEFORE, before) for word in words]
        plain = [word for word in filled if not word.startswith("model.projector=")]  # it may not be there yet
        config = resolved(compose("train", [*plain, f"paths.runs_dir={runs_dir}"]))
        final = training_directory(config, config_dir()) / "final"
        yield Training((*filled, *_into(runs_dir)), final, config)
        before = str(final)


def _train_words(run: Sequence[str]) -> tuple[str, ...]:
    """A recipe's ``_tuned`` twin, or ``model.projector=trained`` beside a recipe, evaluates what the recipe trains."""
    kept = [word for word in run if word != f"model.projector={TRAINED}"]
    return tuple(word.removesuffix(TUNED) if word.startswith("+exp=") else word for word in kept)


def _into(runs_dir: Path) -> tuple[str, ...]:
    return () if runs_dir == Path("runs") else (f"paths.runs_dir={runs_dir}",)


def runs_of(planned: Planned, runs: Sequence[Run]) -> list[Run]:
    """The runs whose settings are the row's; which tasks were asked may differ."""
    config = {key: value for key, value in planned.config.items() if key != "model"}
    model = dict(planned.config["model"])
    if model["projector"] == TRAINED:
        # In a record stands where the tuned weights were.
        model["projector"] = str(training_directory(planned.config, config_dir()) / "final")
    return [run for run in runs if _same(run.record.get("config"), {**config, "model": model})]


def _same(recorded: Mapping[str, Any] | None, config: Mapping[str, Any]) -> bool:
    if recorded is None or recorded.get("seed") != config["seed"]:
        return False
    try:
        changes = recipe_changes(recorded, config)
    except KeyError:  # recorded by a version with other settings
        return False
    return all(change.startswith("eval.tasks=") for change in changes)


def missing_tasks(table: PaperTable, row: Row, planned: Planned, runs: Sequence[Run]) -> list[list[str]]:
    """The tasks that a row still needs, in lists that one eval.py each can answer.

    Scores come from one run; the time of a benchmark only from a run of that benchmark alone. A run of a part of the
    questions (eval.limit) does for a run of the same part, not for a whole one.
    """
    runs = _of_limit(planned, runs)
    open_columns = [
        c
        for c in table.columns
        if table.reason(row, c) is None and not any(holds(run, c) or _waits_for_judge(run, c) for run in runs)
    ]
    scores = [c.task for c in open_columns if c.task is not None and c.cost is None]
    alone = [[c.task] for c in open_columns if c.task is not None and c.cost is not None]
    together = [task for task in dict.fromkeys(scores) if [task] not in alone]
    if any(c.cost is not None and c.task is None for c in open_columns) and not (together or alone or runs):
        together = list(planned.config["eval"]["tasks"])  # a cost that any run of the row tells
    return [*([together] if together else []), *alone]


def unjudged(table: PaperTable, row: Row, planned: Planned, runs: Sequence[Run]) -> list[Path]:
    """The directories of runs whose answers a judge model has yet to score for a blank cell of a row."""
    runs = _of_limit(planned, runs)
    blank = [c for c in table.columns if table.reason(row, c) is None and not any(holds(run, c) for run in runs)]
    return [run.path.parent for run in runs if any(_waits_for_judge(run, column) for column in blank)]


def _waits_for_judge(run: Run, column: Column) -> bool:
    of_judge = column.metric in (JUDGE_ACCURACY, JUDGE_SCORE)
    return of_judge and column.task in run.record["tasks"] and not holds(run, column)


def _of_limit(planned: Planned, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.record.get("limit") in (None, planned.config["eval"]["limit"])]


def missing(
    table: PaperTable,
    planned: Mapping[str, Planned],
    words: Sequence[str],
    runs_dir: Path,
    runs: Sequence[Run],
    benches: Sequence[Bench],
) -> list[Todo]:
    """What fills the blank cells: trainings, then measurements, then evaluations, those of one model after another.

    Last, what a judge model has to score: answers that are there.
    """
    trainings, measurements, evaluations, judgements = [], [], [], []
    for label, entry in planned.items():
        row = table.row(label)
        found = runs_of(entry, runs)
        lists = missing_tasks(table, row, entry, found)
        tells = any(c.training is not None and table.reason(row, c) is None for c in table.columns)
        if tells or (entry.needs_training and lists):
            trainings += [
                Todo(label, "train.py", training.words, makes=training.final)
                for training in entry.trainings
                if not training.final.is_dir()
            ]
        for column in table.columns:
            if column.bench and table.reason(row, column) is None and not cost_of_bench(benches, row, column):
                measurements.append(Todo(label, "bench", _bench_words(row, runs_dir)))
        judgements += [Todo(label, "judge", (str(path),)) for path in unjudged(table, row, entry, found)]
        for tasks in lists:
            command = [*entry.words, *words, *_into(runs_dir)]
            if tasks != list(entry.config["eval"]["tasks"]):
                command.append(f"eval.tasks=[{','.join(tasks)}]")
            waits_for = entry.trainings[-1].final if entry.needs_training else None
            evaluations.append(Todo(label, "eval.py", tuple(command), entry.config, tuple(tasks), waits_for))
    together = sorted(evaluations, key=lambda todo: _model_order(todo, evaluations))
    return list({todo.command: todo for todo in [*trainings, *measurements, *together, *judgements]}.values())


def _model_order(todo: Todo, todos: Sequence[Todo]) -> int:
    """Where the model's first evaluation stands, so that a model is loaded once for all of its rows."""
    return next(number for number, other in enumerate(todos) if other.config["model"] == todo.config["model"])


def _bench_words(row: Row, runs_dir: Path) -> tuple[str, ...]:
    if runs_dir == Path("runs"):
        return row.bench
    named = "-".join(word.partition("=")[2] for word in row.bench)
    return (*row.bench, f"out={runs_dir / 'bench' / named}")


def hours(todo: Todo, runs: Sequence[Run], gpu: str | None = None) -> float | None:
    """How long an evaluation will take, from records of the same model; None where none tells.

    A record's seconds for a question, times the number of questions of each benchmark; compression makes it less.

    Args:
        todo: the evaluation.
        runs: with their records.
        gpu: records of one GPU count that has this in its name; None: those of this machine.
    """
    limit = todo.config["eval"]["limit"] if todo.program == "eval.py" else None
    here, total = machine_of({"hardware": hardware()}), 0.0

    def is_meant(machine: str) -> bool:
        return machine == here if gpu is None else gpu in machine and " x " not in machine and "," not in machine

    known = [run.record for run in runs if _tells_time(run.record, todo, is_meant)]
    known.sort(key=lambda record: str(record.get("created")))  # the newest tells most of this machine's state
    for task in todo.tasks:
        rates = [
            record["wall_time_s"] / sum(entry["num_samples"] for entry in record["tasks"].values())
            for record in known
            if task in record["tasks"]
        ]
        counts = [record["data"][task]["num_rows"] for record in known if task in record["data"]]
        if not rates or not counts:
            return None
        total += rates[-1] * (counts[-1] if limit is None else min(limit, counts[-1]))
    return total / 3600 if todo.tasks else None


def _tells_time(record: Mapping[str, Any], todo: Todo, is_meant: Callable[[str], bool]) -> bool:
    if todo.program != "eval.py" or took_something_over(record):
        return False
    model = (record.get("config") or {}).get("model") or {}
    same_machine = is_meant(machine_of({"hardware": record.get("hardware")}))
    return same_machine and model.get("name_or_path") == todo.config["model"]["name_or_path"]
