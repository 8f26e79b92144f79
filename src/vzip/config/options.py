"""The configuration folder: its groups, and what Hydra's files may call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from vzip.errors import ConfigError, nearest
from vzip.installed import checkout
from vzip.option_files import (
    COUNTS,
    FRACTIONS,
    header,
    is_fraction,
    option_values,
    options,
    own_folder,
    reading_beside,
    split_of,
)

__all__ = ["RECIPE_GROUP", "config_dir", "groups", "header", "option_values", "options"]

RECIPE_GROUP = "exp"

# In configs: ${minus:64,${budget.num_dominant}}, so that a search over one count keeps the sum.
OmegaConf.register_new_resolver("minus", lambda a, b: a - b, replace=True)


def _half(which: str, num_tokens: object) -> int | None:
    """In configs/budget/tokens.yaml; None for what is no number of tokens, which its key's rule refuses."""
    return split_of(num_tokens)[f"num_{which}"] if type(num_tokens) is int and num_tokens > 1 else None


OmegaConf.register_new_resolver("half", _half, replace=True)


def _kept(budget: DictConfig) -> DictConfig:
    """In configs/compressor_base.yaml: the class that holds the budget, with its arguments, by the keys it has."""
    names = FRACTIONS if is_fraction(budget) else COUNTS
    # A budget file of one's own may leave the scope out.
    arguments = {**{name: budget.get(name) for name in names}, "scope": budget.get("scope", "crop")}
    # As a DictConfig: OmegaConf.resolve (--resolve) cannot put a plain dict in an interpolation's place.
    return OmegaConf.create(
        {"_target_": f"vzip.{'FractionBudget' if names is FRACTIONS else 'TokenBudget'}", **arguments}
    )


OmegaConf.register_new_resolver("kept", _kept, replace=True)


def _average_budget(*, _root_: DictConfig) -> int | None:
    """In configs/pruner: the budget where no compressor takes it; None: the pruner's own arguments say."""
    compressor = _root_.get("compressor")
    if not isinstance(compressor, DictConfig) or "budget" in compressor:  # the first: no whole configuration
        return None
    budget = _root_.get("budget")
    if not isinstance(budget, DictConfig):
        return None
    counts = budget.get("num_dominant"), budget.get("num_contextual")
    return sum(counts) if all(type(count) is int for count in counts) else None


OmegaConf.register_new_resolver("average_budget", _average_budget, replace=True)


def config_dir() -> Path:
    """Returns ``configs`` of the checkout, or of the wheel.

    Raises:
        ConfigError: vzip was installed without it.
    """
    return checkout() / "configs"


def groups(directory: Path) -> list[str]:
    """Names of the option groups, recipes and Hydra's own groups left out."""
    return sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name not in (RECIPE_GROUP, "hydra"))


_FLAGS = ("--config-dir", "-cd")  # Hydra's own


class _OwnFolder(SearchPathPlugin):
    """Lets Hydra find the options of the user's folder wherever something is composed."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if (folder := own_folder()) is not None:
            search_path.append("command-line", f"file://{folder}")


@contextlib.contextmanager
def with_own_folder(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Within the block options of the folder that ``--config-dir`` names can be chosen as those of ``configs`` can.

    Yields:
        the arguments, the flag first: Hydra takes it between overrides only there.

    Raises:
        ConfigError: no folder, or none that can be used.
    """
    given: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag in _FLAGS:
            given.append(value or next(words, ""))
        else:
            rest.append(word)
    if not given:
        yield rest
        return
    if len(given) > 1:
        raise ConfigError(f"{_FLAGS[0]} {' '.join(given)}: one folder, which holds all that is your own.")
    folder = Path(given[0]).expanduser().resolve()
    _check_own_folder(given[0], folder, config_dir())
    Plugins.instance().register(_OwnFolder)
    with reading_beside(folder):
        yield [_FLAGS[0], str(folder), *rest]


@contextlib.contextmanager
def with_own_folder_of_job(hydra: DictConfig | HydraConf) -> Iterator[None]:
    """The same in a job of Hydra's, by its configuration: a sweep's launcher may run it in another process."""
    own = [Path(source.path) for source in hydra.runtime.config_sources if source.provider == "command-line"]
    with reading_beside(own[0] if own and own_folder() is None else None):
        yield


def own_folder_overrides() -> list[str]:
    """The flag for a process that is started to do what this one was asked to."""
    return [] if (folder := own_folder()) is None else [_FLAGS[0], str(folder)]


def _check_own_folder(given: str, folder: Path, directory: Path) -> None:
    what = f"{_FLAGS[0]} {given}"
    if not given or not folder.is_dir():
        raise ConfigError(
            f"{what.strip()}: no such folder. It must hold option files as configs does: DIR/budget/mine.yaml."
        )
    known = [*groups(directory), RECIPE_GROUP]
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not {*known, "hydra"} & {*inside}:
        hint = next((hint for name in inside if (hint := nearest(name, known))), "")
        found = f"its folders are {', '.join(inside)}{hint}" if inside else "it has no folders"
        raise ConfigError(f"{what}: no group is in it, {found}; groups: {', '.join(known)}.")
    for group in known:
        for name in options(directory, group):
            own = folder / group / f"{name}.yaml"
            if (
                own.is_file()
                and (directory / group / own.name).is_file()
                and not own.samefile(directory / group / own.name)
            ):
                raise ConfigError(f"{own}: {group}={name} is an option of vzip's already; give yours another name.")
