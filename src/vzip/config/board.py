"""What a leaderboard is made of: one model and protocol, methods times budgets, each cell an evaluation or no cell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from vzip.config.build import EvaluationPlan, evaluation_plan, resolved
from vzip.config.options import config_dir
from vzip.config.overrides import check_overrides
from vzip.config.preview import pruned, visual_tokens
from vzip.config.run_directory import methods_label, model_label, task_label
from vzip.errors import ConfigError, UnsupportedModelError, nearest
from vzip.keys import raise_all
from vzip.methods import find_method, method_names
from vzip.option_files import counted_budget, read_yaml

BUDGETS = "192,128,64,32"
METHODS = "visionzip,divprune,scope,vispruner,holov,mmtok,flowcut,fastv,sparsevlm,pyramiddrop,dart"
# What any method must beat; those in ALWAYS are in every table.
FLOORS = ("random", "uniform", "pooled", "resized", "zero_image")
ALWAYS = ("random", "uniform")
VANILLA, FULL = "vanilla", "full"
_SET_HERE = ("compressor", "pruner", "budget")


@dataclass(frozen=True)
class Method:
    """A method as it was given: its group, its file's name and its own settings, as overrides of the group."""

    group: str
    name: str
    settings: tuple[str, ...] = ()

    def words(self, budget: str) -> list[str]:
        """For eval.py; a pruner's budget is its average over the layers."""
        own = [f"{self.group}={self.name}", *(f"{self.group}.{setting}" for setting in self.settings)]
        return [*(["compressor=none"] if self.group == "pruner" else []), *own, f"budget={budget}"]


@dataclass(frozen=True)
class Cell:
    """A method at a budget.

    Attributes:
        method: as run directories name it (``fastv_K-1``), or ``VANILLA``.
        budget: ``64tok``, or ``FULL``.
        plan: its evaluation; None where the method cannot have the budget.
        reason: why not.
    """

    method: str
    budget: str
    plan: EvaluationPlan | None
    reason: str = ""


@dataclass(frozen=True)
class Board:
    """A leaderboard, checked, with nothing loaded.

    Attributes:
        name: of its folder: model and evaluation.
        cells: vanilla first.
        added: floors that were not asked for.
        runs_dir: where runs go.
    """

    name: Path
    cells: tuple[Cell, ...]
    added: tuple[str, ...]
    runs_dir: Path


def board(words: Sequence[str]) -> Board:
    """Checks the words of the command line and composes every cell.

    Raises:
        ConfigError: naming every wrong word; a benchmark that a judge scores; a budget that not even random tokens fit.
        RunExistsError: a run directory holds a record of other settings.
    """
    given = {"budgets": BUDGETS, "methods": None}
    rest, problems = [], []
    for word in words:
        key, _, value = word.partition("=")
        if key in given:
            given[key] = value
        elif re.split(r"[.]", key)[0] in _SET_HERE:
            problems.append(
                f"{word}: is what the table goes through; write methods=NAME:KEY=VALUE,... and budgets=64,32."
            )
        else:
            rest.append(word)
    budgets = _budgets(str(given["budgets"]), problems)
    methods, added = _methods(given["methods"], problems)
    try:
        check_overrides(rest, config_dir(), "eval")
    except ConfigError as error:
        problems.append(str(error))
    raise_all(problems)
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        return _composed(rest, methods, budgets, added)


def _composed(rest: Sequence[str], methods: Sequence[Method], budgets: Sequence[str], added: Sequence[str]) -> Board:
    from vzip.evaluation.benchmarks.judged import JUDGED_TASKS

    vanilla = [*rest, "compressor=none", f"budget={FULL}"]
    config = resolved(compose("eval", vanilla))
    if config["paths"]["run_dir"] is not None:
        raise ConfigError("paths.run_dir: each run has a directory of its own. Set paths.runs_dir, or --out DIR.")
    if judged := [task for task in config["eval"]["tasks"] or () if task in JUDGED_TASKS]:
        raise ConfigError(
            f"eval.tasks: {', '.join(judged)} need a judge model, whose verdicts come after the runs and cost money."
            " Leave them out (eval.tasks=[...], or an eval=NAME without them, as eval=paper_no_judge)."
        )
    cells = [Cell(VANILLA, FULL, evaluation_plan(compose("eval", vanilla), of_sweep=True))]
    for budget in budgets:
        check_overrides([f"budget={budget}"], config_dir(), "eval")  # makes any number of tokens an option of Hydra's
        cells += [_cell(rest, method, budget) for method in methods]
    if twice := [
        cell for n, cell in enumerate(cells) if (cell.method, cell.budget) in [(c.method, c.budget) for c in cells[:n]]
    ]:
        raise ConfigError(f"methods={twice[0].method}: named twice, with settings that are the same.")
    for cell in cells:
        if cell.method in ALWAYS and cell.plan is None:
            raise ConfigError(f"budgets={cell.budget.removesuffix('tok')}: {cell.reason}")
    name = Path(model_label(config["model"], config_dir()), task_label(config["eval"], config_dir()))
    return Board(name, tuple(cells), tuple(added), Path(config["paths"]["runs_dir"]).expanduser())


def _cell(rest: Sequence[str], method: Method, budget: str) -> Cell:
    composed = compose("eval", [*rest, *method.words(budget)])
    label = methods_label(resolved(composed), config_dir()).removeprefix("none+")
    try:
        plan = evaluation_plan(composed, of_sweep=True)
        visual_tokens(plan)  # of a published model whose weights are not here: its sizes are known
        if plan.pruner is not None:
            pruned(plan)
    except (ConfigError, UnsupportedModelError) as error:
        return Cell(label, budget, None, str(error))
    return Cell(label, budget, plan)


def _budgets(given: str, problems: list[str]) -> list[str]:
    """``192,64tok`` as names of options, the largest first."""
    names = [name.strip().removesuffix("tok") for name in given.split(",")]
    wrong = [name for name in names if counted_budget(f"{name}tok") is None]
    if wrong or len(set(names)) < len(names):
        problems.append(
            f"budgets={given}: must be whole numbers of visual tokens, 2 or more, each once, as budgets={BUDGETS}."
        )
        return []
    return [f"{name}tok" for name in sorted(names, key=int, reverse=True)]


def _methods(given: str | None, problems: list[str]) -> tuple[list[Method], list[str]]:
    """The methods, and the floors that were added to them."""
    known = {name: group for group in ("pruner", "compressor") for name in method_names(group)}
    usual = given is None
    methods = []
    for word in re.split(r",(?![^\[]*\])", METHODS if given is None else given):
        name, *settings = re.split(r":(?![^\[]*\])", word.strip())
        if name not in known:
            hint = nearest(name, known)
            problems.append(
                f"methods={name}: not known{hint}; methods: {', '.join(sorted(known))}. Vanilla always runs."
            )
            continue
        method = Method(known[name], name, tuple(settings))
        if method in methods:
            problems.append(f"methods={word}: named twice.")
        problems += _setting_problems(method)
        methods.append(method)
    floors = [name for name in FLOORS if name in known] if usual else ALWAYS
    added = [name for name in floors if Method("compressor", name) not in methods]
    return [*methods, *(Method("compressor", name) for name in added)], [] if usual else added


def _setting_problems(method: Method) -> list[str]:
    """What is wrong with a method's own settings, whatever the budget."""
    if not method.settings:
        return []
    values: dict[str, Any] = {}
    for setting in method.settings:
        key, sign, value = setting.partition("=")
        if not sign:
            return [f"methods={method.name}:{setting}: write NAME:KEY=VALUE, as fastv:K=1."]
        values[key] = read_yaml(value)
    from vzip.compressors import TokenBudget

    try:
        find_method(method.name, method.group).build(
            TokenBudget(2, 1) if method.group == "compressor" else None, **values
        )
    except ConfigError as error:
        return [str(error)]
    return []
