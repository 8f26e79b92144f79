"""Where a run's record goes, and whether the run is still its recipe.

``<runs_dir>/<task>/<recipe or model>/<compressor>[+<pruner>]-<budget>/seed<k>``. Each part is the option's name as
long as the option is as its file says; a changed setting that changes results is written out, so that no two different
runs share a directory by accident.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vzip.config.options import option_values
from vzip.config.schema import GROUPS, NOT_RESULTS, OPEN_GROUPS
from vzip.config.several_budgets import is_one_of
from vzip.config.validate import TRAINED
from vzip.keys import show
from vzip.option_files import COUNTS, FRACTIONS, is_fraction

TUNED = "_tuned"  # ends the name of a recipe that evaluates what its namesake trains

# Settings that change results, by group; all of ``OPEN_GROUPS`` do.
RESULT_KEYS: Mapping[str, tuple[str, ...]] = {
    group: tuple(key for key in (*GROUPS[group], *own) if key not in NOT_RESULTS)
    for group, own in {"model": (), "budget": FRACTIONS, "eval": ()}.items()
}

# Settings of a model that a recipe's name need not say.
_BESIDE_A_RECIPE = ("projector", "quantization", "positions", "compile")


def run_directory(config: Mapping[str, Any], directory: Path) -> Path:
    """The run directory of a composed, resolved and valid configuration."""
    paths = config["paths"]
    if paths["run_dir"] is not None:
        return Path(paths["run_dir"]).expanduser()
    parts = (
        task_label(config["eval"], directory),
        _recipe_label(config) or model_label(config["model"], directory),
        f"{methods_label(config, directory)}-{budget_label(config['budget'], directory)}",
        f"seed{config['seed']}",
    )
    return Path(paths["runs_dir"]).expanduser().joinpath(*map(_safe, parts))


def training_directory(config: Mapping[str, Any], directory: Path) -> Path:
    """Where a training writes: ``<runs_dir>/train/<train>/<recipe or model>/<compressor>-<budget>/seed<k>``."""
    paths = config["paths"]
    if paths["run_dir"] is not None:
        return Path(paths["run_dir"]).expanduser()
    parts = (
        "train",
        train_label(config["train"], directory),
        # A recipe and its _tuned twin differ in evaluation only: they share one training.
        str(config["recipe"]).removesuffix(TUNED) if config["recipe"] else _plain_model_label(config, directory),
        # Trained for several budgets it is one training, at whichever of them it is evaluated.
        f"{compressor_label(config['compressor'], directory)}-"
        + ("+".join(config["train"].get("budgets") or ()) or budget_label(config["budget"], directory)),
        f"seed{config['seed']}",
    )
    return Path(paths["runs_dir"]).expanduser().joinpath(*map(_safe, parts))


def train_label(train: Mapping[str, Any], directory: Path) -> str:
    """The option's name, and what it changes of its file; how often it saves or whom it tells does not count.

    Nor do several budgets, which stand beside the method.
    """
    usual = option_values(directory, "train", train["name"])
    bookkeeping = ("save_every", "keep_last", "trackers", "budgets")
    changed = [key for key in train if key not in bookkeeping and train[key] != usual.get(key)]
    return train["name"] + "".join(f"_{key}-{show(train[key])}" for key in changed)


def _plain_model_label(config: Mapping[str, Any], directory: Path) -> str:
    model = config["model"]
    return model_label({**model, "projector": None} if model["projector"] == TRAINED else model, directory)


def _recipe_label(config: Mapping[str, Any]) -> str | None:
    """The recipe's name; with tuned weights that are not the recipe's own, and what else its model is, part of it."""
    recipe, model = config["recipe"], config["model"]
    if recipe is None:
        return None
    keys = ("quantization", "positions", "compile") if recipe.endswith(TUNED) else _BESIDE_A_RECIPE
    own = [key for key in keys if model.get(key) is not None and not recipe.endswith(f"_{model[key]}")]
    return recipe + "".join(f"_{key}-{_joined(model[key])}" for key in own)


def task_label(evaluation: Mapping[str, Any], directory: Path) -> str:
    usual = option_values(directory, "eval", evaluation["name"])
    label = evaluation["name"] if evaluation["tasks"] == usual.get("tasks") else "+".join(evaluation["tasks"])
    asked = {k: v for k, v in evaluation["gen_kwargs"].items() if v != usual.get("gen_kwargs", {}).get(k)}
    label += "".join(f"_{key}-{show(value)}" for key, value in asked.items())
    return label + (f"_limit-{evaluation['limit']}" if evaluation["limit"] is not None else "")


def model_label(model: Mapping[str, Any], directory: Path) -> str:
    usual = option_values(directory, "model", model["name"])
    same = model["name_or_path"] == usual.get("name_or_path")
    label = model["name"] if same else Path(model["name_or_path"]).expanduser().resolve().name
    changed = [k for k in RESULT_KEYS["model"] if k != "name_or_path" and model[k] != usual.get(k)]
    return label + "".join(f"_{key}-{_joined(model[key])}" for key in changed)


def _joined(value: Any) -> str:
    """A setting's value as part of a name."""
    return "+".join(map(show, value)) if isinstance(value, list) else show(value)


def methods_label(config: Mapping[str, Any], directory: Path) -> str:
    """The compressor and, if there is one, the pruner."""
    label, pruner = compressor_label(config["compressor"], directory), config["pruner"]
    return label if "_target_" not in pruner else f"{label}+{compressor_label(pruner, directory, 'pruner')}"


def compressor_label(compressor: Mapping[str, Any], directory: Path, group: str = "compressor") -> str:
    """The option's name, and what it changes of its file; of a method around another one always the other one."""
    usual = option_values(directory, group, compressor["name"])
    skipped = ("name", "_target_", "budget")
    changed = {
        key: value
        for key, value in compressor.items()
        if key not in skipped and (key == "of" or value != usual.get(key)) and "${" not in str(usual.get(key))
    }
    return compressor["name"] + "".join(f"_{key}-{_method_label(value)}" for key, value in changed.items())


def _method_label(value: Any) -> str:
    """A setting's value; of a method with settings its name and these."""
    if not isinstance(value, Mapping):
        return show(value)
    others = [f"_{key}-{_method_label(own)}" for key, own in value.items() if key != "name"]
    return f"{show(value.get('name'))}{''.join(others)}"


def budget_label(budget: Mapping[str, Any], directory: Path) -> str:
    name = f"{budget['num_tokens']}tok" if "num_tokens" in budget else budget["name"]
    usual = option_values(directory, "budget", name)
    if is_fraction(budget):  # each with a point: 1.0+0.0 are no counts
        keys, own_label = FRACTIONS, "+".join(str(float(budget[key])) for key in FRACTIONS)
    else:
        keys, own_label = COUNTS, f"{budget['num_dominant']}+{budget['num_contextual']}"
    label = str(name) if all(budget[key] == usual.get(key) for key in keys) else own_label
    scope, own = (value_of({"budget": given}, "budget", "scope") for given in (budget, usual))
    return label + ("" if scope == own else f"_scope-{scope}")


def value_of(config: Mapping[str, Any], group: str, key: str) -> Any:
    """A setting, or its default where a budget file of one's own, or a record from before it, leaves it out."""
    return config[group].get(key, "crop" if (group, key) == ("budget", "scope") else None)


def recipe_changes(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Settings that change results and differ from the recipe's own, as ``key=value (recipe: value)``.

    A recipe with weights for several budgets is the recipe at each of them.
    """
    trained_for = COUNTS if is_one_of(config["budget"], recipe) else ()
    changes = [
        f"{group}.{key}={show(value_of(config, group, key))} (recipe: {show(value_of(recipe, group, key))})"
        for group, keys in RESULT_KEYS.items()
        for key in keys
        if value_of(config, group, key) != value_of(recipe, group, key)
        and not (group == "budget" and key in trained_for)
    ]
    for group in OPEN_GROUPS:
        # A record from before there were pruners has none. The budget inside the compressor and the control's seed
        # repeat settings named elsewhere.
        mine, others = (values.get(group, {"name": "none"}) for values in (config, recipe))
        for key in sorted({*mine, *others} - {"_target_", "budget", "seed"}):
            if mine.get(key) != others.get(key):
                changes.append(f"{group}.{key}={show(mine.get(key))} (recipe: {show(others.get(key))})")
    return changes


def _safe(part: str) -> str:
    """A part as a directory name: no separators, no spaces, at most 120 characters, cut ones told apart."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", part).strip("-.")
    if len(name) > 120:
        name = f"{name[:111]}-{hashlib.sha256(part.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"
    return name or "unnamed"
