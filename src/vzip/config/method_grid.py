"""Overrides with several values (``compressor=visionzip,divprune budget=64tok,32tok``) as methods of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from vzip.config.build import load_arguments, resolved, tuned_weights
from vzip.config.full_budget import full_is_vanilla
from vzip.config.options import config_dir
from vzip.config.overrides import check_overrides, jobs_of
from vzip.config.run_directory import budget_label, compressor_label, model_label
from vzip.config.validate import build_compressor, validate
from vzip.errors import ConfigError

if TYPE_CHECKING:
    from vzip.compressors import Compressor


@dataclass(frozen=True)
class GridMethod:
    """A method at a budget, as a table names them."""

    method: str
    budget: str
    compressor: Compressor


@dataclass(frozen=True)
class MethodGrid:
    """One model and the methods to try on it; nothing is loaded.

    Attributes:
        model: keyword arguments of ``vzip.load_vlm``, the compressor left out.
        model_name: as run directories name it.
        methods: in the order of the overrides, each once.
    """

    model: dict[str, Any]
    model_name: str
    methods: tuple[GridMethod, ...]


NO_ANSWER = "fidelity reads vanilla's answer in one pass with its prompt, where a pruner would choose by the answer"


def method_grid(overrides: Sequence[str], why_no_pruner: str = NO_ANSWER) -> MethodGrid:
    """Composes every combination as a sweep (``eval.py -m``) would; ``budget=full`` is vanilla whatever the compressor.

    Args:
        overrides: as for ``eval.py -m``.
        why_no_pruner: what is said to who asks for one.

    Raises:
        ConfigError: naming every problem of the overrides; a pruner; values that mean more than one model.
    """
    directory = config_dir()
    check_overrides(["-m", *overrides], directory, "eval")
    jobs = list(jobs_of(OverridesParser.create().parse_overrides(list(overrides))))
    if not jobs:
        raise ConfigError("an interval has no list of values; write them out, as budget=64tok,32tok.")
    methods: dict[tuple[str, str], GridMethod] = {}
    models: list[tuple[str, dict[str, Any]]] = []
    with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
        for job in jobs:
            config = full_is_vanilla(resolved(compose("eval", job)), directory)
            validate(config)
            if "_target_" in config["pruner"]:
                raise ConfigError(f"pruner={config['pruner']['name']}: {why_no_pruner}. Leave it out (pruner=none).")
            label, budget = compressor_label(config["compressor"], directory), budget_label(config["budget"], directory)
            key = (label, f"{budget} seed{config['seed']}")
            methods.setdefault(key, GridMethod(label, budget, build_compressor(config["compressor"])))
            model = {**config["model"], "projector": tuned_weights(config, directory)}
            models.append((model_label(model, directory), load_arguments(model)))
    (name, arguments), *others = models
    if different := [other for other, given in others if given != arguments]:
        raise ConfigError(
            f"model: {name} and {different[0]} cannot be compared in one run, since vanilla is of one model. Give one"
            " value to every model setting."
        )
    return MethodGrid(arguments, name, tuple(methods.values()))
