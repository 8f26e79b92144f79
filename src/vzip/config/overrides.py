"""Reads the command line before Hydra does, so that every wrong override is named at once, with its nearest name."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from vzip.config import schema
from vzip.config.full_budget import full_is_vanilla
from vzip.config.missing_keys import absent_settings
from vzip.config.options import RECIPE_GROUP, groups, option_values, options
from vzip.config.validate import find_problems
from vzip.errors import ConfigError, nearest
from vzip.keys import raise_all

# Words of Hydra's own command line that take a value of their own.
_FLAGS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
_FLAGS_WITH_VALUE |= {"--config-dir", "-cd", "--experimental-rerun", "--info", "-i"}
_SWEEP_FLAGS = ("-m", "--multirun")
_SHOW_FLAGS = ("--cfg", "-c", "--info", "-i")

_COUNTED = re.compile(r"budget=(\d+)tok")
logger = logging.getLogger(__name__)

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
    absent = absent_settings(good, directory, config_name)
    problems += absent.values()
    good = [override for override in good if override.input_line not in absent]
    if problems or is_sweep(arguments):
        problems += _check_values(good, directory, config_name, is_sweep(arguments))
    raise_all(problems)


def is_sweep(arguments: Sequence[str]) -> bool:
    return any(word in _SWEEP_FLAGS for word in arguments)


def counted_budgets(arguments: Sequence[str], directory: Path) -> list[str]:
    """The words with ``budget=48tok``, of which there is no file, as two counts in the paper's ratio.

    The paper's 64, 128 and 192 are 54 + 10, 108 + 20 and 162 + 30: 5.4 dominant tokens to 1 contextual.
    """
    words: list[str] = []
    for word in arguments:
        found = _COUNTED.fullmatch(word)
        if found is None or int(found[1]) < 2 or f"{found[1]}tok" in options(directory, "budget"):
            words.append(word)
            continue
        num_tokens = int(found[1])
        num_contextual = max(1, round(num_tokens / 6.4))
        words += [f"budget.num_dominant={num_tokens - num_contextual}", f"budget.num_contextual={num_contextual}"]
        logger.info("%s: %d dominant + %d contextual tokens", word, num_tokens - num_contextual, num_contextual)
    return words


def arrange(arguments: Sequence[str]) -> list[str]:
    """A sweep's command line with ``-m`` first, and the overrides that choose a recipe or a model before the others.

    Hydra understands ``-m`` between overrides only there, and changes the last fastest: so each model is loaded once.
    """
    if not is_sweep(arguments):
        return list(arguments)
    words = [word for word in arguments if word not in _SWEEP_FLAGS]
    of_model = [word for word in words if re.match(rf"\+{RECIPE_GROUP}=|\+*model[.=]", word)]
    return ["-m", *of_model, *(word for word in words if word not in of_model)]


def sweep_jobs(words: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep: every combination of the values, the last override changing fastest.

    Raises:
        ConfigError: an override whose values are not listed.
    """
    choices = _choices(OverridesParser.create().parse_overrides(list(words)))
    if choices is None:
        raise ConfigError("an interval has no list of values; write them out, as budget=64tok,32tok.")
    return [list(job) for job in itertools.product(*choices)]


def _choices(overrides: Sequence[Override]) -> list[list[str]] | None:
    """Of each override its values as overrides; None if one's are not listed."""
    choices: list[list[str]] = []
    for override in overrides:
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            values = [str(value) for value in override.sweep_string_iterator()]
            choices.append([f"{override.get_key_element()}={value}" for value in values])
        else:
            return None
    return choices


def _check_values(overrides: Sequence[Override], directory: Path, config_name: str, of_sweep: bool) -> list[str]:
    """Problems of the configurations that the overrides compose: one, or each of a sweep, before any of it starts."""
    choices = _choices(overrides)
    if choices is None:
        return []  # an interval of an optimising sweeper: its values are not known yet
    problems: list[str] = []
    with initialize_config_dir(str(directory), version_base="1.3"):
        for words in itertools.islice(itertools.product(*choices), MAX_JOBS_CHECKED):
            composed = OmegaConf.to_container(compose(config_name, list(words)), resolve=True)
            if isinstance(composed, dict):
                config = {str(key): value for key, value in composed.items()}
                if config_name == "eval" and of_sweep:
                    config = full_is_vanilla(config, directory)
                problems += find_problems(config)
    return list(dict.fromkeys(problems))


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
    value = override.value()
    names = [str(v) for v in value.list] if isinstance(value, Sweep) and hasattr(value, "list") else [str(value)]
    allowed = options(directory, group)
    return [
        f"{group}={name}: no such option{nearest(name, allowed)}. Available options in '{group}':\n"
        + "\n".join(f"       {option}" for option in allowed)
        + ("\nOr counts of your own: budget.num_dominant=D budget.num_contextual=C." if group == "budget" else "")
        for name in names
        if name not in allowed and not isinstance(value, dict)
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
