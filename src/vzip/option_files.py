"""The files of options in ``configs``, read without Hydra: names, values, what each is."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from vzip.errors import ConfigError


class _Loader(yaml.SafeLoader):
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
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot be read as YAML: {' '.join(str(error).split())}") from error


def options(directory: Path, group: str) -> list[str]:
    """Names a group can be set to."""
    return sorted(p.stem for p in (directory / group).glob("*.yaml"))


def option_values(directory: Path, group: str, name: str) -> dict[str, Any]:
    """What an option's file sets, on top of the files that its defaults list builds on; nothing if there is no file.

    What a file overrides in other groups is not its own.

    Raises:
        ConfigError: a file that is no mapping.
    """
    relative = name.removesuffix("@_here_")
    path = directory / (f"{relative[1:]}.yaml" if relative.startswith("/") else f"{group}/{relative}.yaml")
    if not path.is_file():
        return {}
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
