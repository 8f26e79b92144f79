"""A described setting: its rule, its checks, its lines for a terminal."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vzip import keys
from vzip.errors import ConfigError
from vzip.keys import key


@dataclass(frozen=True)
class Inner:
    rate: float | None = key(keys.optional(keys.number(0.0)), "how fast; null: not at all", default=None)


@dataclass(frozen=True)
class Outer:
    count: int = key(keys.whole_number(1), "how many")
    mode: str = key(keys.one_of("slow", "fast"), "in what way")
    inner: dict | None = key(keys.optional(keys.mapping("a mapping")), "more of it", nested=Inner)
    internal: int = 0


KEYS = keys.keys_of(Outer)
GOOD = {"count": 2, "mode": "fast", "inner": None}


def test_a_dataclass_holds_its_settings_and_describes_them() -> None:
    assert Inner().rate is None and Outer(2, "slow", None).internal == 0
    with pytest.raises(TypeError, match="count"):
        Outer(mode="slow", inner=None)
    assert list(KEYS) == ["count", "mode", "inner"] and KEYS["inner"].nested == keys.keys_of(Inner)


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
    ("rule", "good", "bad"),
    [
        (keys.positive(), [1, 0.5], [0, True, "1"]),
        (keys.share(), [0, 1, 0.5], [1.1, False]),
        (keys.texts("names"), [["a"]], [[], "a", [""], [1]]),
        (keys.subset_of("a", "b"), [["a"], ["b", "a"]], [[], ["a", "a"], ["c"]]),
        (keys.subset_of("a", empty=True), [[]], ["a"]),
        (keys.or_auto(keys.whole_number(1)), ["auto", 1], [0, None]),
        (keys.BOOL, [True], [1, None]),
    ],
    ids=lambda value: value.text if isinstance(value, keys.Rule) else "",
)
def test_rules(rule: keys.Rule, good: list, bad: list) -> None:
    assert all(rule.allows(value) for value in good) and not any(rule.allows(value) for value in bad)
