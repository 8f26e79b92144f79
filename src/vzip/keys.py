"""Settings, each described once: a dataclass field with its type, the rule for its value and one sentence.

From these descriptions come the checks of a configuration, ``--help``, ``vzip list`` and the bench's overrides.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vzip.errors import ConfigError, nearest
from vzip.json_files import whole_text

MAX_SEED = 2**32 - 1  # the largest that NumPy and torch both take
UNSET = "???"  # in YAML, a value that the command line must give


@dataclass(frozen=True)
class Rule:
    """What a value must be: in words that end "must be ...", as a test, and the names if it is one of several."""

    text: str
    allows: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_number(minimum: int) -> Rule:
    return Rule(f"a whole number, {minimum} or more", lambda v: isinstance(v, int) and _is_number(v) and v >= minimum)


def number(minimum: float) -> Rule:
    return Rule(f"a number, {minimum:g} or more", lambda v: _is_number(v) and minimum <= v < math.inf)


def _or_one_of(rule: Rule, *names: str) -> Rule:
    return Rule(f"{rule.text}, or {', '.join(names)}", lambda v: v in names or rule.allows(v))


BOOL = Rule("true or false", lambda v: isinstance(v, bool))
POSITIVE = Rule("a number above 0", lambda v: _is_number(v) and 0 < v < math.inf)
SHARE = Rule("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)


def one_of(*names: str, note: str = "") -> Rule:
    return Rule(f"one of {', '.join(names)}{note}", lambda v: v in names, names)


def _is_text(value: Any) -> bool:
    """Whether it is a text that is not empty and that a tokenizer and a file can hold."""
    return isinstance(value, str) and value != "" and "\0" not in value and whole_text(value) == value


def text(what: str) -> Rule:
    return Rule(what, _is_text)


def texts(what: str) -> Rule:
    return Rule(what, lambda v: isinstance(v, list) and len(v) > 0 and all(map(_is_text, v)))


def once_each(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, each once", lambda v: rule.allows(v) and len(set(v)) == len(v))


def at_most(rule: Rule, maximum: int) -> Rule:
    return Rule(f"{rule.text} and at most {maximum}", lambda v: rule.allows(v) and v <= maximum)


SEED = at_most(whole_number(0), MAX_SEED)


def subset_of(*names: str, empty: bool = False) -> Rule:
    return Rule(
        f"a list of {'any' if empty else 'at least one'} of {', '.join(names)}, each once",
        lambda v: isinstance(v, list) and (empty or len(v) > 0) and set(v) <= set(names) and len(set(v)) == len(v),
    )


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, or null", lambda v: v is None or rule.allows(v), rule.choices)


@dataclass(frozen=True)
class Key:
    """The description of a setting: its rule, what it is for, whether a group must have it, and what is inside it."""

    rule: Rule
    sentence: str
    required: bool = True
    nested: Mapping[str, Key] = field(default_factory=dict)


def key(sentence: str, *, at_least: float = 0, what: str = "", rule: Rule | None = None, default: Any = MISSING) -> Any:
    """A dataclass field that is a setting. Its type says what it may be; a dataclass as type is a mapping of settings.

    Args:
        sentence: what it is for, and what null or 0 mean where that is not plain.
        at_least: of a number, or of how many a list has.
        what: of a text, a list of texts or a mapping, ending the sentence "must be ...".
        rule: in place of what the type says, null aside.
        default: its value where none is given.
    """
    return field(default=default, metadata={"sentence": sentence, "says": (rule, at_least, what)})


def keys_of(settings: type) -> dict[str, Key]:
    """The settings that a dataclass describes, in its order."""
    hints, found = get_type_hints(settings), {}
    for f in fields(settings):
        if "says" in f.metadata:
            parts = (hints[f.name], *get_args(hints[f.name]))
            nested = [keys_of(part) for part in parts if isinstance(part, type) and is_dataclass(part)]
            rule = _rule_of(hints[f.name], *f.metadata["says"])
            found[f.name] = Key(rule, f.metadata["sentence"], f.default is MISSING, *nested)
    return found


def _rule_of(hint: Any, rule: Rule | None, at_least: float, what: str) -> Rule:
    """The rule that a type says; ``rule`` in its place, unless there is null besides."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        first, *others = (part for part in inner if part is not type(None))
        own = _rule_of(first, rule, at_least, what)
        if rule is None and others:
            own = _or_one_of(own, *get_args(others[0]))
        return optional(own) if type(None) in inner and not own.allows(None) else own
    if rule is not None:
        return rule
    if get_origin(hint) is Literal:
        return one_of(*inner)
    if get_origin(hint) in (list, tuple):
        return texts(what) if inner[0] is str else subset_of(*get_args(inner[0]), empty=at_least == 0)
    if is_dataclass(hint):
        return Rule(what, lambda v: isinstance(v, dict))
    known = {bool: lambda: BOOL, int: lambda: whole_number(int(at_least)), float: lambda: number(at_least)}
    return known.get(hint, lambda: text(what))()


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
        elif keys[own].nested and isinstance(value, Mapping):
            problems += check_group(name, value, keys[own].nested)
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
    """Lines for a terminal: each setting as it is typed, its default if there is one, its rule, its sentence."""
    lines = []
    for name, own in keys.items():
        default = f" [{defaults[name]}]" if defaults and name in defaults else ""
        lines += _filled(f"{prefix}{name}{default}: {own.rule.text}", 2) + _filled(own.sentence, 6)
        lines += describe(own.nested, f"{prefix}{name}.")
    return lines


def _filled(words: str, indent: int) -> list[str]:
    return textwrap.wrap(words, 118, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4))
