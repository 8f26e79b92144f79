"""Methods and budgets by name, from ``configs``: for who builds one without Hydra."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, nearest
from vzip.installed import checkout
from vzip.keys import show
from vzip.option_files import counted_budget, option_values, options

if TYPE_CHECKING:
    from vzip.compressors import FractionBudget, TokenBudget


@dataclass(frozen=True)
class MethodFile:
    """A method as its file describes it.

    Attributes:
        group: ``compressor`` or ``pruner``.
        name: of the file.
        method: the class.
        settings: what it takes beside the budget, with the file's value, or the class's own where the file takes it
            from elsewhere in a configuration (``${seed}``).
        has_budget: whether it takes a budget.
    """

    group: str
    name: str
    method: Callable[..., Any]
    settings: Mapping[str, Any]
    has_budget: bool

    def build(self, budget: TokenBudget | FractionBudget | None = None, **settings: Any) -> Any:
        """The method with this budget, and these settings in place of the file's.

        Raises:
            ConfigError: a setting that it does not have, or what its class refuses.
        """
        for key in settings.keys() - self.settings.keys():
            raise ConfigError(
                f"{self.group}.{key}: {self.group}={self.name} has no such setting{nearest(key, self.settings)};"
                f" it has: {', '.join(self.settings) or 'none'}."
            )
        return self.method(**({"budget": budget} if self.has_budget else {}), **{**self.settings, **settings})

    def label(self, settings: Mapping[str, Any]) -> str:
        """The name, and those settings that are not the file's."""
        changed = {key: value for key, value in settings.items() if value != self.settings.get(key)}
        return self.name + "".join(f"_{key}-{show(value)}" for key, value in changed.items())


def method_files(group: str = "compressor") -> dict[str, MethodFile]:
    """Every method of a group by name; ``pruner=none``, which is no method, left out."""
    return {name: _read(group, name, own) for name, own in _values(group).items() if "_target_" in own}


def method_names(group: str = "compressor") -> tuple[str, ...]:
    """The names of ``method_files``; of compressors those that take a budget. No class is imported."""
    values = _values(group)
    return tuple(n for n, own in values.items() if "_target_" in own and (group != "compressor" or "budget" in own))


def budgets() -> dict[str, tuple[int, int]]:
    """Dominant and contextual tokens of every budget that has a file, the largest first, by name.

    Those without counts of their own, as ``budget=full``, are left out.
    """
    counted = {name: own for name, own in _values("budget").items() if isinstance(own.get("num_dominant"), int)}
    found: dict[str, tuple[int, int]] = {
        name: (own["num_dominant"], own["num_contextual"]) for name, own in counted.items()
    }
    return dict(sorted(found.items(), key=lambda item: -sum(item[1])))


def find_budget(name: str) -> tuple[int, int] | None:
    """The counts of a budget that has a file, of any number of tokens (``48tok``), or None."""
    own = budgets().get(name)
    if own is None and (counted := counted_budget(name)) is not None:
        return counted["num_dominant"], counted["num_contextual"]
    return own


def _values(group: str) -> dict[str, dict[str, Any]]:
    directory = checkout() / "configs"
    return {name: option_values(directory, group, name) for name in options(directory, group)}


def find_method(name: str, group: str = "compressor") -> MethodFile:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    known = method_files(group)
    if name not in known:
        raise ConfigError(f"{group}={name}: not known{nearest(name, known)}; allowed are {', '.join(known)}.")
    return known[name]


def _read(group: str, name: str, values: Mapping[str, Any]) -> MethodFile:
    module, _, class_name = str(values["_target_"]).rpartition(".")
    method = getattr(importlib.import_module(module), class_name)
    parameters = inspect.signature(method).parameters
    settings = {key: values.get(key, parameter.default) for key, parameter in parameters.items() if key != "budget"}
    own = {key: parameters[key].default if "${" in str(value) else value for key, value in settings.items()}
    return MethodFile(group, name, method, own, "budget" in parameters)
