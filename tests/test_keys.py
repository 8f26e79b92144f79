"""A described setting: its rule, its checks, its lines for a terminal."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any, Literal

import pytest

from vzip import keys
from vzip.errors import ConfigError
from vzip.keys import key


@dataclass(frozen=True)
class Inner:
    rate: float | None = key("how fast; null: not at all", default=None)


@dataclass(frozen=True)
class Outer:
    count: int = key("how many", at_least=1)
    mode: Literal["slow", "fast"] = key("in what way")
    inner: Inner | None = key("more of it", what="a mapping")
    internal: int = 0


KEYS = keys.keys_of(Outer)
GOOD = {"count": 2, "mode": "fast", "inner": None}


def test_a_dataclass_holds_its_settings_and_describes_them() -> None:
    assert Inner().rate is None and Outer(2, "slow", None).internal == 0
    with pytest.raises(TypeError, match="count"):
        Outer(mode="slow", inner=None)
    assert list(KEYS) == ["count", "mode", "inner"] and list(KEYS["inner"].nested) == ["rate"]


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({}, []),
        ({"inner": {"rate": None}}, []),
        ({"inner": {}}, []),
        ({"count": True}, ["group.count=true: must be a whole number, 1 or more."]),
        ({"count": "???"}, ["group.count: must be given, as group.count=VALUE: a whole number, 1 or more."]),
        ({"mode": "fats"}, ["group.mode=fats: must be one of slow, fast (did you mean 'fast'?)."]),
        ({"inner": 3}, ["group.inner=3: must be a mapping, or null."]),
        ({"inner": {"rate": -1}}, ["group.inner.rate=-1: must be a number, 0 or more, or null."]),
        (
            {"inner": {"rats": 1}},
            ["group.inner.rats: no such key (did you mean 'group.inner.rate'?); allowed: rate."],
        ),
    ],
)
def test_values_are_checked(changed: dict, problems: list[str]) -> None:
    assert keys.check_group("group", {**GOOD, **changed}, KEYS) == problems


def test_all_problems_are_named_and_missing_keys_last() -> None:
    found = keys.check_group("group", {"mode": 1, "cuont": 2}, KEYS)
    assert [problem.split(":")[0] for problem in found] == ["group.mode=1", "group.cuont", "group.count", "group.inner"]
    with pytest.raises(ConfigError, match=r"^4 problems in the configuration:\n  1\. group\.mode=1"):
        keys.raise_all(found)
    with pytest.raises(ConfigError, match=r"^one$"):
        keys.raise_all(["one"])
    keys.raise_all([])


def test_lines_for_a_terminal() -> None:
    assert keys.describe(KEYS, "group.", {"mode": "slow"}) == [
        "  group.count: a whole number, 1 or more",
        "      how many",
        "  group.mode [slow]: one of slow, fast",
        "      in what way",
        "  group.inner: a mapping, or null",
        "      more of it",
        "  group.inner.rate: a number, 0 or more, or null",
        "      how fast; null: not at all",
    ]


@pytest.mark.parametrize(
    ("hint", "says", "text", "good", "bad"),
    [
        (bool, {}, "true or false", [True], [1, None]),
        (int, {"at_least": 1}, "a whole number, 1 or more", [1], [0, True, 1.0, "1", None]),
        (int | None, {}, "a whole number, 0 or more, or null", [0, None], [-1]),
        (int | Literal["auto"], {"at_least": 1}, "a whole number, 1 or more, or auto", ["auto", 1], [0, None]),
        (float, {}, "a number, 0 or more", [0, 0.5], [-1, "1", True]),
        (float, {"rule": keys.POSITIVE}, "a number above 0", [1, 0.5], [0, True, "1"]),
        (float | None, {"rule": keys.SHARE}, "a number from 0 to 1, or null", [0, 1, None], [1.1, False]),
        (str, {"what": "a name"}, "a name", ["a"], ["", 1, None]),
        (list[str], {"what": "names"}, "names", [["a"]], [[], "a", [""], [1]]),
        (tuple[Literal["a", "b"], ...], {}, "a list of any of a, b, each once", [[], ["b", "a"]], [["a", "a"], ["c"]]),
        (list[Literal["a"]], {"at_least": 1}, "a list of at least one of a, each once", [["a"]], [[], "a"]),
        (Literal["a", "b"] | None, {}, "one of a, b, or null", ["a", None], ["c"]),
    ],
    ids=str,
)
def test_the_type_says_what_a_value_may_be(hint: Any, says: dict, text: str, good: list, bad: list) -> None:
    rule = keys.keys_of(make_dataclass("Settings", [("it", hint, key("", **says))]))["it"].rule
    assert rule.text == text
    assert all(rule.allows(value) for value in good) and not any(rule.allows(value) for value in bad)
