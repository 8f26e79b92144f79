"""Settings that the options chosen do not have, such as ``train.lora.r`` beside ``train=projector``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from vzip.config import schema
from vzip.config.options import RECIPE_GROUP, groups, option_values, options


def absent_settings(overrides: Sequence[Override], directory: Path, config_name: str) -> dict[str, str]:
    """The overrides, all well-formed, that set what their options do not hold: the override, and what is wrong with it.

    Without this, Hydra would tell to append the setting with ``+``, which no option would understand.
    """
    of_all = {
        group: [key for key in keys if all(key in own for own in schema.KINDS.get(group, {}).values())]
        for group, keys in schema.GROUPS.items()
    }
    always = [*schema.TOP, *(f"{group}.{key}" for group, keys in of_all.items() for key in keys)]
    known = groups(directory)
    settings = [
        override
        for override in overrides
        if "." in override.key_or_group
        and override.key_or_group.split(".")[0] in known
        and override.key_or_group not in always
        and not (override.is_add() or override.is_force_add() or override.is_delete())
    ]
    if not settings:
        return {}  # composing costs a quarter of a second
    chosen = [o for o in overrides if o.key_or_group in (*known, RECIPE_GROUP)]
    problems: dict[str, str] = {}
    with initialize_config_dir(str(directory), version_base="1.3"):
        for words in itertools.product(*map(_alternatives, chosen)):
            config = OmegaConf.to_container(compose(config_name, list(words)), resolve=False)
            assert isinstance(config, dict)
            for override in settings:
                if not _holds(config, override.key_or_group):
                    problems.setdefault(str(override.input_line), _problem(override.key_or_group, config, directory))
    return problems


def _alternatives(override: Override) -> list[str]:
    """The override itself, or, for a sweep over options, one for each."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _holds(config: Mapping[Any, Any], key: str) -> bool:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def _problem(key: str, config: Mapping[Any, Any], directory: Path) -> str:
    group, _, rest = key.partition(".")
    having = [name for name in options(directory, group) if _holds(option_values(directory, group, name), rest)]
    means = f"options of {group} that have it: {', '.join(having)}" if having else f"write +{key}=VALUE to add it"
    return f"{key}: {group}={config[group]['name']} has no such setting; {means}."
