"""Methods around another method, which is named: what the files of ``configs/compressor`` that have an ``of`` build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from vzip.compressors import Compressor, MergeDropped, TokenBudget, WithoutOutliers
from vzip.errors import ConfigError, nearest
from vzip.keys import show
from vzip.methods import find_method, method_names
from vzip.ops.merge import MergeRule


class NamedMergeDropped(MergeDropped):
    """``MergeDropped`` of a method by name, which configs/compressor/merge_dropped.yaml sets."""

    def __new__(  # type: ignore[misc]  # a target must be a class; what it makes is the very one, with one repr
        cls, budget: TokenBudget, of: object, merge_rule: MergeRule = "sum", seed: int = 0
    ) -> MergeDropped:
        return MergeDropped(wrapped_method(of, budget, seed), merge_rule)


class NamedWithoutOutliers(WithoutOutliers):
    """``WithoutOutliers`` of a method by name, which configs/compressor/without_outliers.yaml sets."""

    def __new__(  # type: ignore[misc]
        cls, budget: TokenBudget, of: object, threshold: float = 2.0, seed: int = 0
    ) -> WithoutOutliers:
        return WithoutOutliers(wrapped_method(of, budget, seed), threshold)


def wrapped_method(of: object, budget: TokenBudget, seed: int = 0) -> Compressor:
    """The compressor that ``compressor.of`` means.

    Args:
        of: the name of an option, or a mapping of ``name`` and those settings that are not the option's.
        budget: of the method.
        seed: of the run, for a method that has one.

    Raises:
        ConfigError: an unknown name, one without a budget, or a setting that the method does not have.
    """
    given = dict(of) if isinstance(of, Mapping) else {"name": of}
    name, names = given.pop("name", None), method_names()
    if name not in names:
        hint = "" if name is None else nearest(str(name), names)
        raise ConfigError(
            f"compressor.of={show(of)}: must be the name of a method{hint}, or a mapping of its name and settings, as"
            f" compressor.of={{name: scope, alpha: 0.5}}; methods: {', '.join(names)}."
        )
    entry = find_method(name)
    if "seed" in entry.settings:
        given = {"seed": seed, **given}
    return cast(Compressor, entry.build(budget, **given))
