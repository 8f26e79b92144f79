"""Methods by name, from ``configs/compressor`` and ``configs/pruner``: for who builds one without Hydra."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from vzip.compressors import TokenBudget
from vzip.errors import ConfigError, nearest
from vzip.installed import checkout


@dataclass(frozen=True)
class MethodFile:
    """A method as its file describes it.

    Attributes:
        name: of the file.
        method: the class.
        settings: what it takes beside the budget, with the file's value, or the class's own where the file takes it
            from elsewhere in a configuration (``${seed}``).
        has_budget: whether it takes a budget.
    """

    name: str
    method: Callable[..., Any]
    settings: Mapping[str, Any]
    has_budget: bool

    def build(self, budget: TokenBudget | None = None, **settings: Any) -> Any:
        """The method with this budget, and these settings in place of the file's; raises as its class does."""
        return self.method(**({"budget": budget} if self.has_budget else {}), **{**self.settings, **settings})


def method_files(group: str = "compressor") -> dict[str, MethodFile]:
    """Every method of a group by name; ``pruner=none``, which is no method, left out."""
    files = sorted((checkout() / "configs" / group).glob("*.yaml"))
    values = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    return {name: _read(name, own) for name, own in values.items() if "_target_" in own}


def find_method(name: str) -> MethodFile:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    known = method_files()
    if name not in known:
        raise ConfigError(f"compressor={name}: not known{nearest(name, known)}; allowed are {', '.join(known)}.")
    return known[name]


def _read(name: str, values: Mapping[str, Any]) -> MethodFile:
    module, _, class_name = str(values["_target_"]).rpartition(".")
    method = getattr(importlib.import_module(module), class_name)
    parameters = inspect.signature(method).parameters
    settings = {key: values.get(key, parameter.default) for key, parameter in parameters.items() if key != "budget"}
    own = {key: parameters[key].default if "${" in str(value) else value for key, value in settings.items()}
    return MethodFile(name, method, own, "budget" in parameters)
