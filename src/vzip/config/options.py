"""The configuration folder: its groups, their options and the recipes' headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vzip.errors import ConfigError
from vzip.installed import checkout

RECIPE_GROUP = "exp"

# In configs: ${minus:64,${budget.num_dominant}}, so that a search over one count keeps the sum.
OmegaConf.register_new_resolver("minus", lambda a, b: a - b, replace=True)


def config_dir() -> Path:
    """Returns ``configs`` of the checkout, or of the wheel.

    Raises:
        ConfigError: vzip was installed without it.
    """
    return checkout() / "configs"


def groups(directory: Path) -> list[str]:
    """Names of the option groups, recipes and Hydra's own groups left out."""
    return sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name not in (RECIPE_GROUP, "hydra"))


def options(directory: Path, group: str) -> list[str]:
    """Names a group can be set to."""
    return sorted(p.stem for p in (directory / group).glob("*.yaml"))


def option_values(directory: Path, group: str, name: str) -> dict[str, Any]:
    """What an option's file sets, on top of the files that its defaults list builds on; nothing if there is no file.

    Interpolations stay as they are written. What a file overrides in other groups is not its own.

    Raises:
        ConfigError: a file that is no mapping.
    """
    relative = name.removesuffix("@_here_")
    path = directory / (f"{relative[1:]}.yaml" if relative.startswith("/") else f"{group}/{relative}.yaml")
    if not path.is_file():
        return {}
    loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must be a mapping of settings; it starts: {header(path)[:1]}.")
    values: dict[str, Any] = {}
    for entry in loaded.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            values |= option_values(directory, group, entry)
    return values | {str(key): value for key, value in loaded.items()}


def header(path: Path) -> list[str]:
    """The comment at the top of a config file, without Hydra's ``@package`` line and the comment signs."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("#").strip())
    return lines
