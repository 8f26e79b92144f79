"""Every key that a configuration may hold, and the rule for its value.

The YAML files carry the defaults and say what a key means; here stands what is allowed, once for evaluation and
training. The ``compressor`` group is open: its keys are the arguments of its ``_target_``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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


def number(minimum: float) -> Rule:
    return Rule(
        f"a number, {minimum:g} or more",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v >= minimum,
    )


def one_of(*names: str) -> Rule:
    return Rule("one of " + ", ".join(names), lambda v: v in names, names)


def text(what: str) -> Rule:
    return Rule(what, lambda v: isinstance(v, str) and v != "")


def texts(what: str, empty: bool = False) -> Rule:
    return Rule(
        what, lambda v: isinstance(v, list) and (empty or len(v) > 0) and all(isinstance(i, str) and i for i in v)
    )


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, or null", lambda v: v is None or rule.allows(v), rule.choices)


def count(minimum: int) -> Rule:
    """A number of tokens; null stands for "no budget" in budget=full."""
    rule = optional(whole_number(minimum))
    return Rule(f"a whole number of tokens a crop, {minimum} or more (not a ratio)", rule.allows)


BOOL = Rule("true or false", lambda v: isinstance(v, bool))

TOP: Mapping[str, Rule] = {
    "recipe": optional(text("the name of a file in configs/exp")),
    "seed": whole_number(0),
    "overwrite": BOOL,
}

GROUPS: Mapping[str, Mapping[str, Rule]] = {
    "model": {
        "name": text("the option's name"),
        "name_or_path": text("a hub id, a checkpoint directory or vzip/tiny"),
        "revision": optional(text("a commit, tag or branch of the hub's repository")),
        "dtype": one_of("auto", "float32", "bfloat16", "float16"),
        "device_map": optional(
            Rule("auto, cpu, cuda, cuda:0 ..., or a mapping of modules to devices", lambda v: isinstance(v, str | dict))
        ),
        "attn_implementation": one_of("sdpa", "eager", "flash_attention_2"),
        "quantization": optional(one_of("8bit", "4bit")),
        "preprocess": one_of("llava", "hf"),
        "drop_padding": BOOL,
        "row_newline": BOOL,
        "num_frames": optional(whole_number(1)),
        "num_tower_tokens": optional(whole_number(1)),
        "system_prompt": optional(text("a text")),
    },
    "budget": {
        "name": text("the option's name"),
        "num_dominant": count(1),
        "num_contextual": count(0),
    },
    "data": {"name": text("the option's name")},
    "train": {"name": text("the option's name")},
    "eval": {
        "name": text("the option's name"),
        "tasks": texts("a list of at least one task name, as eval.tasks=[pope,gqa]"),
        "limit": optional(whole_number(1)),
        "batch_size": whole_number(1),
        "include_path": optional(text("a folder of lmms-eval task files, or built-in")),
        "gen_kwargs": Rule("a mapping", lambda v: isinstance(v, dict)),
    },
    "launcher": {"num_threads": optional(whole_number(1))},
    "paths": {
        "runs_dir": text("a directory"),
        "run_dir": optional(text("a directory")),
        "scenes_dir": optional(text("a directory")),
    },
}

GENERATION: Mapping[str, Rule] = {
    "max_new_tokens": optional(whole_number(1)),
    "do_sample": optional(BOOL),
    "temperature": optional(number(0.0)),
    "top_p": optional(number(0.0)),
    "num_beams": optional(whole_number(1)),
    "until": optional(texts("a list of strings at which an answer ends")),
}

COMPRESSOR_OPEN_GROUP = "compressor"


def known_keys() -> list[str]:
    """Every dotted key of the schema; the open group's own keys are not among them."""
    keys = [*TOP, *(f"eval.gen_kwargs.{key}" for key in GENERATION)]
    for group, rules in GROUPS.items():
        keys += [f"{group}.{key}" for key in rules]
    return keys
