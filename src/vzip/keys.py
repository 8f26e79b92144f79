"""Settings, each described once: a dataclass field with its type, the rule for its value and one sentence.

From these descriptions come the checks of a configuration, ``--help``, ``vzip list`` and the bench's overrides.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from vzip.errors import ConfigError, nearest

UNSET = "???"  # in YAML, a value that the command line must give


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        text: the rule in words, ending the sentence "must be ...".
        allows: whether a value keeps it.
        choices: the names to choose from, if the rule is a list of names.
    """

    text: str
    allows: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def whole_number(minimum: int) -> Rule:
    return Rule(
        f"a whole number, {minimum} or more",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= minimum,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(minimum: float) -> Rule:
    return Rule(f"a number, {minimum:g} or more", lambda v: _is_number(v) and v >= minimum)


def positive() -> Rule:
    return Rule("a number above 0", lambda v: _is_number(v) and v > 0)


def share() -> Rule:
    return Rule("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)


def one_of(*names: str, note: str = "") -> Rule:
    return Rule(f"one of {', '.join(names)}{note}", lambda v: v in names, names)


def text(what: str) -> Rule:
    return Rule(what, lambda v: isinstance(v, str) and v != "")


def texts(what: str) -> Rule:
    return Rule(what, lambda v: isinstance(v, list) and len(v) > 0 and all(isinstance(i, str) and i for i in v))


def mapping(what: str) -> Rule:
    return Rule(what, lambda v: isinstance(v, dict))


def subset_of(*names: str, empty: bool = False) -> Rule:
    return Rule(
        f"a list of {'any' if empty else 'at least one'} of {', '.join(names)}, each once",
        lambda v: isinstance(v, list) and (empty or len(v) > 0) and set(v) <= set(names) and len(set(v)) == len(v),
    )


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, or null", lambda v: v is None or rule.allows(v), rule.choices)


def or_auto(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, or auto", lambda v: v == "auto" or rule.allows(v), rule.choices)


BOOL = Rule("true or false", lambda v: isinstance(v, bool))


@dataclass(frozen=True)
class Key:
    """The description of a setting.

    Attributes:
        rule: what its value must be.
        sentence: what it is for, and what null or 0 mean where that is not plain.
        required: whether a group must have it.
        nested: the settings inside a value that is a mapping, by name.
    """

    rule: Rule
    sentence: str
    required: bool = True
    nested: Mapping[str, Key] | None = None


def key(rule: Rule, sentence: str, default: Any = MISSING, nested: type | None = None) -> Any:
    """A dataclass field that is a setting; ``nested`` is the dataclass of a value that is a mapping."""
    inside = None if nested is None else keys_of(nested)
    return field(default=default, metadata={"key": Key(rule, sentence, default is MISSING, inside)})


def keys_of(settings: type) -> dict[str, Key]:
    """The settings that a dataclass describes, in its order."""
    return {f.name: f.metadata["key"] for f in fields(settings) if "key" in f.metadata}


def check_value(name: str, value: Any, rule: Rule) -> list[str]:
    """What is wrong with a value, in at most one message; ``name`` is what a user writes."""
    if value == UNSET:
        return [f"{name}: must be given, as {name}=VALUE: {rule.text}."]
    if rule.allows(value):
        return []
    hint = nearest(str(value), rule.choices) if rule.choices else ""
    return [f"{name}={show(value)}: must be {rule.text}{hint}."]


def check_group(group: str, values: Any, keys: Mapping[str, Key]) -> list[str]:
    """What is wrong with a group's values: wrong, unknown and missing ones, in this order."""
    if not isinstance(values, Mapping):
        return [f"{group}={values!r}: must be one of the group's options, not a value."]
    problems = []
    for own, value in values.items():
        name = f"{group}.{own}"
        if own not in keys:
            hint = nearest(name, [f"{group}.{other}" for other in keys])
            problems.append(f"{name}: no such key{hint}; allowed: {', '.join(keys)}.")
        elif (nested := keys[own].nested) is not None and isinstance(value, Mapping):
            problems += check_group(name, value, nested)
        else:
            problems += check_value(name, value, keys[own].rule)
    missing = [own for own, description in keys.items() if description.required and own not in values]
    return problems + [f"{group}.{own}: missing; {group}/*.yaml sets it." for own in missing]


def raise_all(problems: Sequence[str]) -> None:
    """Raises one ConfigError for all problems, or does nothing if there is none."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        listed = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        raise ConfigError(f"{len(problems)} problems in the configuration:\n{listed}")


def show(value: Any) -> str:
    """A value as one types it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def describe(keys: Mapping[str, Key], prefix: str = "", defaults: Mapping[str, str] | None = None) -> list[str]:
    """Lines for a terminal: of each setting its name, the rule and the sentence; those inside it follow.

    Args:
        keys: the settings.
        prefix: what is typed before each name, as ``launcher.``.
        defaults: by name, to be shown beside it.
    """
    lines = []
    for name, own in keys.items():
        default = f" [{defaults[name]}]" if defaults and name in defaults else ""
        lines += _filled(f"{prefix}{name}{default}: {own.rule.text}", 2) + _filled(own.sentence, 6)
        lines += describe(own.nested or {}, f"{prefix}{name}.")
    return lines


def _filled(words: str, indent: int) -> list[str]:
    return textwrap.wrap(words, 118, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4))
