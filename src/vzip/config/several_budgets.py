"""``train.budgets``: one training for several budgets, of which each step is at one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vzip.config.options import config_dir, option_values, options
from vzip.errors import ConfigError, nearest
from vzip.option_files import COUNTS, is_fraction, is_option

_LIST = re.compile(r"budget=\[([^\[\]]*)\]")


def spelled_out(words: Sequence[str], config_name: str) -> list[str]:
    """A command line in which ``budget=[64,128]`` is ``train.budgets=[64tok,128tok]`` with the last one as ``budget``.

    Hydra cannot take it as it stands: a group's option is one, and its value is no name.

    Raises:
        ConfigError: the command does not train.
    """
    found = []
    for word in words:
        if (match := _LIST.fullmatch(word)) is None:
            found.append(word)
            continue
        names = [name.strip() for name in match[1].split(",") if name.strip()]
        names = [f"{name}tok" if name.isdigit() else name for name in names]
        if config_name != "train":
            raise ConfigError(
                f"{word}: a run is at one budget. Several, one run after the other, are -m budget={','.join(names)};"
                f" weights that were trained for all of them are found by train.budgets=[{','.join(names)}]."
            )
        found += [f"train.budgets=[{','.join(names)}]", *(f"budget={name}" for name in names[-1:])]
    return found


def budget_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names in ``train.budgets``, a list of texts."""
    names = _names(config)
    problems, seen = list[str](), dict[tuple[int, int], str]()
    for name in names:
        values = option_values(config_dir(), "budget", name)
        counts = _counts(values)
        if not is_option(config_dir(), "budget", name):
            hint = nearest(name, options(config_dir(), "budget"))
            problems.append(f"train.budgets: {name} is no budget{hint}; write numbers of tokens, as [64tok,128tok].")
        elif is_fraction(values):
            problems.append(f"train.budgets: {name} is in fractions; only numbers of tokens go together, as 64tok.")
        elif counts is None:
            why = "keeps every visual token" if name == "full" else "names no number of tokens"
            problems.append(f"train.budgets: {name} {why}; a training for several budgets takes numbers, as 64tok.")
        elif counts in seen:
            problems.append(f"train.budgets: {seen[counts]} and {name} are the same {sum(counts)} tokens; name one.")
        else:
            seen[counts] = name
    return problems


def is_one_of(budget: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a budget is among a configuration's ``train.budgets``."""
    counts = _counts(budget)
    return counts is not None and counts in map(_counts_of, _names(config))


def check_is_one_of_them(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a training at several budgets whose ``budget`` is another one, which would be ignored."""
    if (names := _names(config)) and not is_one_of(config["budget"], config):
        raise ConfigError(
            f"budget={config['budget'].get('name')} is none of train.budgets={_shown(names)}, at which the steps are:"
            f" leave it out, set budget={names[-1]}, or give all of them at once: budget={_shown(names)}."
        )


def at_each_budget(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configuration at each of ``train.budgets``, in their order; as it is where there are none, or no method."""
    names = _names(config) if "budget" in config["compressor"] else []
    return [_at(config, name) for name in names] or [dict(config)]


def at_largest_budget(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same at the one of most tokens: what memory and lengths must be enough for."""
    return max(at_each_budget(config), key=lambda each: sum(_counts(each["budget"]) or (0,)))


def _at(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    values = {**option_values(config_dir(), "budget", name), "scope": config["budget"].get("scope", "crop")}
    compressor = config["compressor"]
    of_class = {**compressor["budget"], "_target_": "vzip.TokenBudget"}
    of_class = {key: value for key, value in of_class.items() if key not in ("dominant", "contextual")}
    own = {**of_class, **{key: values[key] for key in COUNTS}}
    return {**config, "budget": values, "compressor": {**compressor, "budget": own}}


def _names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("train", {}).get("budgets")
    return [str(name) for name in names] if isinstance(names, list) else []


def _counts(budget: Mapping[str, Any]) -> tuple[int, int] | None:
    dominant, contextual = (budget.get(key) for key in COUNTS)
    return (dominant, contextual) if isinstance(dominant, int) and isinstance(contextual, int) else None


def _counts_of(name: str) -> tuple[int, int] | None:
    return _counts(option_values(config_dir(), "budget", name))


def _shown(names: Sequence[str]) -> str:
    return f"[{','.join(names)}]"
