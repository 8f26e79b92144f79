"""Reads the command line before Hydra does, so that every wrong override is named at once, with its nearest name."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from vzip.config import schema
from vzip.config.full_budget import full_is_vanilla
from vzip.config.missing_keys import absent_settings
from vzip.config.options import RECIPE_GROUP, groups, option_values, options, own_folder_overrides
from vzip.config.validate import find_problems
from vzip.errors import ConfigError, nearest
from vzip.keys import raise_all
from vzip.option_files import counted_budget, is_option

# Words of Hydra's own command line that take a value of their own.
_FLAGS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
_FLAGS_WITH_VALUE |= {"--config-dir", "-cd", "--experimental-rerun", "--info", "-i"}
_SWEEP_FLAGS = ("-m", "--multirun")
_SHOW_FLAGS = ("--cfg", "-c", "--info", "-i")

logger = logging.getLogger(__name__)

_OR_COUNTS = "\nOr any number of tokens, as budget=48tok, or counts: budget.num_dominant=D budget.num_contextual=C."

# A sweep's jobs that are composed beforehand (a quarter of a second each); every job is checked again when it starts.
MAX_JOBS_CHECKED = 64


def override_words(arguments: Sequence[str]) -> list[str]:
    """The ``key=value`` overrides of a command line, Hydra's own flags and their values left out."""
    words: list[str] = []
    skip = False
    for word in arguments:
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = word in _FLAGS_WITH_VALUE
        else:
            words.append(word)
    return words


def check_overrides(arguments: Sequence[str], directory: Path, config_name: str) -> None:
    """Checks groups, options and keys of a command line against the configuration folder.

    If one is wrong, the others are composed and their values judged too, so that one message names everything. The
    jobs of a sweep are judged before the first one starts. Otherwise values are left to the composed configuration.
    From here on Hydra composes the budgets too that are named by their number of tokens.

    Raises:
        ConfigError: naming every wrong override.
    """
    shows = [word for word in arguments if word in _SHOW_FLAGS or word.startswith(("--cfg=", "--info="))]
    if shows and is_sweep(arguments):
        raise ConfigError(f"-m with {shows[0]}: the configuration of one job can be shown; leave out -m.")
    problems: list[str] = []
    good: list[Override] = []
    parser = OverridesParser.create()
    for word in override_words(arguments):
        found = _check_word(word, parser, directory)
        problems += found
        good += [] if found else parser.parse_overrides([word])
    _offer_counted_budgets(good, directory)
    absent = absent_settings(good, directory, config_name)
    problems += absent.values()
    good = [override for override in good if override.input_line not in absent]
    if problems or is_sweep(arguments):
        deeply = not problems or any(map(_needs_a_look, good))
        problems += _check_values(good, directory, config_name, is_sweep(arguments), deeply)
    raise_all(problems)


def is_sweep(arguments: Sequence[str]) -> bool:
    return any(word in _SWEEP_FLAGS for word in arguments)


def _offer_counted_budgets(overrides: Sequence[Override], directory: Path) -> None:
    """Makes ``budget=48tok``, of which there is no file, an option of Hydra's, and says how it is split.

    With ``compressor=none`` it is a pruner's average, and nothing is split.
    """
    of_pruner = any(o.key_or_group == "compressor" and _names_of(o) == ["none"] for o in overrides)
    for override in overrides:
        for name in _names_of(override) if override.key_or_group == "budget" else ():
            values = None if name in options(directory, "budget") else counted_budget(name)
            if values is not None:
                # Kept for the process, and handed on to those that a sweep's launcher starts.
                ConfigStore.instance().store(name, values, group="budget")
                counts = values["num_dominant"], values["num_contextual"]
                if not of_pruner:
                    logger.info("budget=%s: %d dominant + %d contextual tokens", name, *counts)


def _names_of(override: Override) -> list[str]:
    """The options that an override of a group names: one, or a sweep's."""
    value = override.value()
    if isinstance(value, Sweep):
        return [str(v) for v in value.list] if hasattr(value, "list") else []
    return [str(value)]


def arrange(arguments: Sequence[str]) -> list[str]:
    """A sweep's command line with ``-m`` first, and the overrides that choose a recipe or a model before the others.

    Hydra understands ``-m`` between overrides only there, and changes the last fastest: so each model is loaded once.
    """
    if not is_sweep(arguments):
        return list(arguments)
    words = [word for word in arguments if word not in _SWEEP_FLAGS]
    of_model = [word for word in words if re.match(rf"\+{RECIPE_GROUP}=|\+*model[.=]", word)]
    folder = own_folder_overrides()
    others = [word for word in words[len(folder) :] if word not in of_model]
    return [*folder, "-m", *of_model, *others]


def _needs_a_look(override: Override) -> bool:
    """Whether an override can go wrong with others in a way that only the methods' classes, so torch, can tell."""
    group, dot, _ = override.key_or_group.partition(".")
    return group in (*schema.OPEN_GROUPS, "budget") or (dot != "" and group in ("model", "eval", "paths"))


def _check_values(
    overrides: Sequence[Override], directory: Path, config_name: str, of_sweep: bool, deeply: bool
) -> list[str]:
    """Problems of the configurations that the overrides compose: one, or each of a sweep, before any of it starts."""
    problems: list[str] = []
    with initialize_config_dir(str(directory), version_base="1.3"):
        for words in itertools.islice(jobs_of(overrides), MAX_JOBS_CHECKED):
            composed = OmegaConf.to_container(compose(config_name, words), resolve=True)
            if isinstance(composed, dict):
                config = {str(key): value for key, value in composed.items()}
                if config_name == "eval" and of_sweep:
                    config = full_is_vanilla(config, directory)
                problems += find_problems(config, deeply)
    return list(dict.fromkeys(problems))


def jobs_of(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """The overrides of each job that these come to: one, or those of a sweep, the last changing fastest.

    There are none where an interval of an optimising sweeper is among them, whose values are not known yet.
    """
    choices: list[list[str]] = []
    for override in overrides:
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            values = [str(value) for value in override.sweep_string_iterator()]
            choices.append([f"{override.get_key_element()}={value}" for value in values])
        else:
            return
    for words in itertools.product(*choices):
        yield list(words)


def _check_word(word: str, parser: OverridesParser, directory: Path) -> list[str]:
    # Hydra's parser speaks of "lexer errors"; the commonest slip is a word without a value.
    if "=" not in word and not word.startswith("~"):
        return [f"'{word}': not a setting; write group=option or key=value."]
    try:
        override = parser.parse_overrides([word])[0]
    except HydraException as error:
        reason = str(error).splitlines()[0]
        return [f"'{word}': cannot be read ({reason}); quote the whole word, as 'eval.tasks=[pope,gqa]'."]
    key = override.key_or_group
    if re.split(r"[./]", key)[0] == "hydra":
        return []
    known = groups(directory)
    if key == RECIPE_GROUP or key in known:
        return _check_option(override, directory)
    return _check_key(key, directory, known, adds=override.is_add())


def _check_option(override: Override, directory: Path) -> list[str]:
    group = override.key_or_group
    if group == RECIPE_GROUP and not override.is_add():
        return [f"{group} is no group of the defaults list: write +{group}=NAME."]
    if override.is_delete():
        return [f"~{group}: every group must keep an option."]
    allowed = options(directory, group)
    return [
        f"{group}={name}: no such option{nearest(name, allowed)}. Available options in '{group}':\n"
        + "\n".join(f"       {option}" for option in allowed)
        + (_OR_COUNTS if group == "budget" else "")
        for name in _names_of(override)
        if not is_option(directory, group, name) and not isinstance(override.value(), dict)
    ]


def _check_key(key: str, directory: Path, known: list[str], adds: bool) -> list[str]:
    keys = [*schema.known_keys(), *_method_keys(directory)]
    if key in keys or any(k.startswith(f"{key}.") for k in keys):
        return []
    group, dot, _ = key.partition(".")
    if dot and group in schema.OPEN_GROUPS and (adds or key.startswith("compressor.budget.")):
        return []  # an argument that no file names yet: the method's class judges it
    within = [k for k in keys if k.startswith(f"{group}.")]
    if not dot or not within:
        hint = nearest(key, [*known, *schema.TOP, *keys])
        return [f"{key}: no such key or group{hint}; groups: {', '.join(known)}; keys: {', '.join(schema.TOP)}."]
    return [f"{key}: no such key{nearest(key, within)}; keys of {group}: {', '.join(_names(within))}."]


def _names(keys: list[str]) -> list[str]:
    return [key.partition(".")[2] for key in keys if key.count(".") == 1]


def _method_keys(directory: Path) -> list[str]:
    named = [(group, name) for group in schema.OPEN_GROUPS for name in options(directory, group)]
    return sorted({f"{group}.{key}" for group, name in named for key in option_values(directory, group, name)})
