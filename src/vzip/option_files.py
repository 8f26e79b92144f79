"""The files of options in ``configs``, read without Hydra: names, values, what each is."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vzip.errors import ConfigError


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # C's is ten times as fast
    """YAML as Hydra reads it: 1e-5 is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(text: str) -> Any:
    """A document or a single value; interpolations (``${...}``) stay as they are written.

    Raises:
        ConfigError: it is no YAML.
    """
    try:
        return copy.deepcopy(_parsed(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot be read as YAML: {' '.join(str(error).split())}") from error


@functools.cache
def _parsed(text: str) -> Any:
    """Of each text once: a command reads the same hundred files many times."""
    return yaml.load(text, _Loader)


# What a budget says: counts, or fractions of the patches.
COUNTS = ("num_dominant", "num_contextual")
FRACTIONS = ("dominant", "contextual")


def is_fraction(budget: Mapping[str, Any]) -> bool:
    """Whether a budget is given in fractions; ``full`` is given in nothing."""
    return any(key in budget for key in FRACTIONS)


_COUNT = re.compile(r"([1-9]\d*)tok")


def split_of(num_tokens: int) -> dict[str, int]:
    """A budget of that many tokens a crop, 2 or more, as the paper splits its own: 5.4 dominant to 1 contextual.

    The paper's 64, 128 and 192 are 54 + 10, 108 + 20 and 162 + 30.
    """
    num_contextual = max(1, round(num_tokens / 6.4))
    return {"num_dominant": num_tokens - num_contextual, "num_contextual": num_contextual}


def counted_budget(name: str) -> dict[str, Any] | None:
    """What ``budget=48tok`` sets, whatever files there are; None for a name that is no number of tokens."""
    found = _COUNT.fullmatch(name)
    return (
        {"name": name, **split_of(int(found[1])), "scope": "crop"} if found is not None and int(found[1]) > 1 else None
    )


def is_option(directory: Path, group: str, name: str) -> bool:
    """Whether a group can be set to it: a file's name, or a budget's number of tokens."""
    return name in options(directory, group) or (group == "budget" and counted_budget(name) is not None)


_own: list[Path] = []  # the user's folder, while there is one


def own_folder() -> Path | None:
    """The folder of the user's own that is read beside ``configs`` (``--config-dir``), or None."""
    return _own[-1] if _own else None


@contextlib.contextmanager
def reading_beside(folder: Path | None) -> Iterator[None]:
    """Within the block a group's options are those of ``configs`` and of this folder."""
    _own.extend([] if folder is None else [folder])
    try:
        yield
    finally:
        del _own[len(_own) - (folder is not None) :]


def options(directory: Path, group: str) -> list[str]:
    """Names a group can be set to."""
    return sorted({path.stem for folder in (directory, *_own) for path in (folder / group).glob("*.yaml")})


def option_file(directory: Path, group: str, name: str) -> Path:
    """The file of an option: the folder's, or else the user's own."""
    paths = [folder / group / f"{name}.yaml" for folder in (directory, *_own)]
    return next((path for path in paths if path.is_file()), paths[0])


def option_values(directory: Path, group: str, name: str) -> dict[str, Any]:
    """What an option's file sets, on top of the files that its defaults list builds on; nothing if there is no file.

    What a file overrides in other groups is not its own. A budget needs no file: see ``counted_budget``.

    Raises:
        ConfigError: a file that is no mapping.
    """
    relative = name.removesuffix("@_here_")
    path = option_file(directory, "" if relative.startswith("/") else group, relative.removeprefix("/"))
    if not path.is_file():
        return (counted_budget(name) or {}) if group == "budget" else {}
    try:
        loaded = read_yaml(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must be a mapping of settings; it starts: {header(path)[:1]}.")
    values: dict[str, Any] = {}
    for entry in loaded.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            values = _merged(values, option_values(directory, group, entry))
    return _merged(values, loaded)


def _merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``values``, mappings inside joined key by key, as Hydra does."""
    both = {key for key in values.keys() & over.keys() if isinstance(values[key], dict) and isinstance(over[key], dict)}
    return values | over | {key: _merged(values[key], over[key]) for key in both}


def header(path: Path) -> list[str]:
    """The comment at the top of a config file, without Hydra's ``@package`` line and the comment signs."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return [line.lstrip("#").rstrip()[1:] for line in comment if "@package" not in line]


def comments(path: Path) -> dict[str, str]:
    """What stands beside a file's own values, by key."""
    lines = re.findall(r"^(\w+):[^#\n]*#\s*(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(lines)


def summary(path: Path) -> str:
    """The first sentence of a config file's comment."""
    text = " ".join(line for line in header(path) if not line.startswith("  "))
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
