"""Every key that a configuration may hold, and the rule for its value.

The YAML files carry the defaults and say what a key means; here stands what is allowed, once for evaluation and
training. The groups ``compressor`` and ``pruner`` are open: their keys are the arguments of their ``_target_``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vzip.json_files import whole_text

MAX_SEED = 2**32 - 1


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
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and minimum <= v < math.inf,
    )


def seed() -> Rule:
    """What NumPy and torch both take."""
    rule = whole_number(0)
    return Rule(f"a whole number, 0 or more and at most {MAX_SEED}", lambda v: rule.allows(v) and v <= MAX_SEED)


def one_of(*names: str) -> Rule:
    return Rule("one of " + ", ".join(names), lambda v: v in names, names)


def text(what: str) -> Rule:
    return Rule(what, _is_text)


def _is_text(value: Any) -> bool:
    """Whether it is a text that is not empty and that a tokenizer and a file can hold."""
    return isinstance(value, str) and value != "" and "\0" not in value and whole_text(value) == value


def texts(what: str, empty: bool = False) -> Rule:
    return Rule(what, lambda v: isinstance(v, list) and (empty or len(v) > 0) and all(map(_is_text, v)))


def once_each(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, each once", lambda v: rule.allows(v) and len(set(v)) == len(v))


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, or null", lambda v: v is None or rule.allows(v), rule.choices)


def or_auto(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, or auto", lambda v: v == "auto" or rule.allows(v), rule.choices)


def count(minimum: int) -> Rule:
    """A number of tokens; null stands for "no budget" in budget=full."""
    rule = optional(whole_number(minimum))
    return Rule(f"a whole number of tokens a crop, {minimum} or more (not a ratio)", rule.allows)


def positive() -> Rule:
    return Rule(
        "a number above 0", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf
    )


def share() -> Rule:
    return Rule(
        "a number from 0 to 1", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1
    )


def subset_of(*names: str, empty: bool = False) -> Rule:
    return Rule(
        f"a list of {'any' if empty else 'at least one'} of {', '.join(names)}, each once",
        lambda v: isinstance(v, list) and (empty or len(v) > 0) and set(v) <= set(names) and len(set(v)) == len(v),
    )


AUTO = "auto"  # of launcher

BOOL = Rule("true or false", lambda v: isinstance(v, bool))

TOP: Mapping[str, Rule] = {
    "recipe": optional(text("the name of a file in configs/exp")),
    "seed": seed(),
    "dry_run": BOOL,
    "overwrite": BOOL,
}

GROUPS: Mapping[str, Mapping[str, Rule]] = {
    "model": {
        "name": text("the option's name"),
        "name_or_path": text("a hub id, a checkpoint directory or vzip/tiny"),
        "revision": optional(text("a commit, tag or branch of the hub's repository")),
        "assembled_from": optional(
            Rule("a list of vision tower and language model", lambda v: texts("").allows(v) and len(v) == 2)
        ),
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
        "drop_cls": BOOL,
        "adapter_path": optional(text("a directory with a PEFT checkpoint (LoRA), or a hub id")),
        "projector": optional(text("a directory that train.py wrote, or trained: this command line's own")),
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
        "tasks": once_each(texts("a list of at least one task name, as eval.tasks=[pope,gqa]")),
        "limit": optional(whole_number(1)),
        "batch_size": or_auto(whole_number(1)),
        "num_workers": whole_number(0),
        "on_problem": one_of("refuse", "skip"),
        "trackers": subset_of("wandb", empty=True),
        "include_path": optional(text("a folder of lmms-eval task files (their code is run), built-in or video")),
        "tower_cache_gib": optional(number(0.0)),
        "gen_kwargs": Rule("a mapping", lambda v: isinstance(v, dict)),
    },
    "launcher": {
        "name": text("the option's name"),
        "num_threads": optional(whole_number(1)),
        "device": one_of("auto", "cpu", "cuda"),
        "num_processes": whole_number(1),
        "num_machines": optional(whole_number(1)),
        "strategy": one_of("single", "ddp", "zero2", "zero3"),
        "batch_size": whole_number(1),
        "gradient_checkpointing": BOOL,
        "num_workers": whole_number(0),
    },
    "paths": {
        "runs_dir": text("a directory"),
        "run_dir": optional(text("a directory")),
        "scenes_dir": optional(text("a directory")),
        "video_root": optional(text("a directory")),
    },
}

# Groups whose options are of different kinds, with keys of their own; an option without a kind has a name only.
KINDS: Mapping[str, Mapping[str, Mapping[str, Rule]]] = {
    "data": {
        "llava_json": {
            "name": text("the option's name"),
            "kind": one_of("llava_json"),
            "json": text("a file in LLaVA's format, as data.json=FILE"),
            "image_root": optional(text("the folder that the file's image paths start from")),
            "fraction": Rule(
                "a number above 0 and at most 1, as 0.1 or 1/10",
                lambda v: isinstance(v, int | float | str) and not isinstance(v, bool),
            ),
            "subset_seed": whole_number(0),
            "keep_text_only": BOOL,
            "on_problem": one_of("refuse", "skip"),
        },
        "scenes": {
            "name": text("the option's name"),
            "kind": one_of("scenes"),
            "num_pictures": whole_number(1),
            "num_questions": whole_number(1),
        },
    },
    "train": {
        "tune": {
            "name": text("the option's name"),
            "kind": one_of("tune"),
            "parts": subset_of("projector", "language_model", "vision_tower"),
            "reset_projector": BOOL,
            "template": one_of("vicuna_v1", "plain", "chat"),
            "max_length": whole_number(16),
            "learning_rate": number(0.0),
            "tower_learning_rate": optional(number(0.0)),
            "weight_decay": number(0.0),
            "warmup_fraction": share(),
            "num_epochs": whole_number(1),
            "num_steps": optional(whole_number(1)),
            "samples_per_step": whole_number(1),
            "max_grad_norm": optional(positive()),
            "loss_norm": one_of("tokens", "samples"),
            "precision": one_of("float32", "bfloat16"),
            "tf32": BOOL,
            "save_every": whole_number(1),
            "keep_last": whole_number(1),
            "num_validation_samples": whole_number(0),
            "trackers": subset_of("wandb", "tensorboard", empty=True),
            "lora": optional(Rule("a mapping (train=projector_lora has one)", lambda v: isinstance(v, dict))),
        },
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

LORA: Mapping[str, Rule] = {
    "r": whole_number(1),
    "alpha": positive(),
    "dropout": share(),
    "target_modules": texts("a list of at least one name of the language model's linear layers, as [q_proj,v_proj]"),
    "learning_rate": optional(number(0.0)),
}

# Values that are mappings with rules of their own.
NESTED: Mapping[str, Mapping[str, Rule]] = {"eval.gen_kwargs": GENERATION, "train.lora": LORA}

OPEN_GROUPS = ("compressor", "pruner")


def rules_of(group: str, values: Mapping[str, Any]) -> Mapping[str, Rule]:
    """The rules for a group's values: those of their kind, where the group's options are of several.

    In ``launcher=auto`` a null stands for what train.py chooses.
    """
    if group == "launcher" and values.get("name") == AUTO:
        return {key: optional(rule) for key, rule in GROUPS[group].items()}
    return KINDS.get(group, {}).get(str(values.get("kind")), GROUPS[group])


def known_keys() -> list[str]:
    """Every dotted key of the schema; the open groups' own keys are not among them."""
    keys = [*TOP, *(f"{name}.{key}" for name, rules in NESTED.items() for key in rules)]
    for group, rules in GROUPS.items():
        keys += [f"{group}.{key}" for key in rules]
    for group, kinds in KINDS.items():
        keys += [f"{group}.{key}" for rules in kinds.values() for key in rules]
    return list(dict.fromkeys(keys))
