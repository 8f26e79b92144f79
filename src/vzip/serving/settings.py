"""What a server compresses with: read from the model's configuration, and refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from vzip.compressors import Compressor, TokenBudget
from vzip.errors import ConfigError, nearest
from vzip.media.images import Preprocess
from vzip.methods import MethodFile, find_method
from vzip.models.families.options import FamilyOptions
from vzip.option_files import COUNTS

from .adapters import served_adapter
from .projector import TunedProjector

KEY = "vzip"
_KEYS = ("compressor", "budget", "preprocess", "projector", "drop_padding", "row_newline")
_EMBED = (
    "compute its visual tokens with `python -m vzip embed` and hand those to the server (--enable-mm-embeds), or choose"
    " another method, such as visionzip"
)


@dataclass(frozen=True)
class ServingSettings:
    """What ``read_settings`` returns, checked.

    Attributes:
        method: the compressor's file.
        arguments: its own settings, where they are not the file's.
        budget: the most that a request may ask for, and what it gets if it asks for nothing; None: the method has none.
        preprocess: as ``load_vlm``'s.
        projector: tuned weights that take the place of the checkpoint's, or None.
        options: of the family.
    """

    method: MethodFile
    arguments: Mapping[str, Any]
    budget: TokenBudget | None
    preprocess: Preprocess
    projector: TunedProjector | None
    options: FamilyOptions
    _built: dict[TokenBudget | None, Compressor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def compressor(self) -> Compressor:
        """With the server's budget."""
        return self.with_budget(self.budget)

    def with_budget(self, budget: TokenBudget | None) -> Compressor:
        """The same method with a request's budget."""
        if budget not in self._built:
            self._built[budget] = self.method.build(budget, **self.arguments)
        return self._built[budget]

    def asked_for(self, processor_kwargs: Mapping[str, object]) -> TokenBudget | None:
        """The budget of a request, by its ``mm_processor_kwargs``.

        Raises:
            ConfigError: not the counts of a budget, or more tokens than the server's.
        """
        asked = processor_kwargs.get(KEY)
        if asked is None:
            return self.budget
        if self.budget is None:
            raise ConfigError(f"mm_processor_kwargs.{KEY}={asked!r}: compressor={self.method.name} takes no budget.")
        budget = _budget(asked, f"mm_processor_kwargs.{KEY}")
        if budget.num_tokens > self.budget.num_tokens:
            raise ConfigError(
                f"mm_processor_kwargs.{KEY} asks for {budget.num_tokens} visual tokens per crop: this server keeps"
                f" {self.budget.num_tokens} at most. Ask for fewer, or start it with a larger budget."
            )
        return budget

    @property
    def identity(self) -> str:
        """All that decides the visual tokens of an image beside model and budget of the request: for vLLM's caches."""
        tuned = None if self.projector is None else self.projector.header["sha256"]
        return f"{KEY}:{self.compressor!r}:{self.preprocess}:{tuned}:{self.options!r}"


def read_settings(config: Any) -> ServingSettings:
    """The settings of a model's configuration as ``--hf-overrides`` leaves it, checked against the model.

    Args:
        config: Hugging Face's configuration, its ``architectures`` one of ours, with ``vzip``, a mapping of
            ``compressor``: ``name`` (an option of ``compressor``) and its own settings; ``budget``: ``num_dominant``
            and ``num_contextual``, or null for a method without one; ``preprocess`` (``llava`` by default),
            ``projector``, ``drop_padding`` and ``row_newline`` as ``load_vlm``'s.

    Raises:
        ConfigError: an unknown key, method or setting; a budget that does not fit the vision tower; a method that
            vLLM cannot run.
        UnsupportedModelError: a model that is not served.
    """
    return check_settings(config, getattr(config, KEY, None))


def check_settings(config: Any, values: object) -> ServingSettings:
    """The same of a mapping that is no part of the configuration yet."""
    architecture, adapter_class = served_adapter(config)
    if not isinstance(values, Mapping):
        raise ConfigError(
            f'{KEY}={values!r}: must be a mapping with compressor and budget, as --hf-overrides \'{{"{KEY}":'
            ' {"compressor": {"name": "visionzip"}, "budget": {"num_dominant": 54, "num_contextual": 10}}}\'.'
        )
    for key in values.keys() - set(_KEYS):
        raise ConfigError(f"{KEY}.{key}: no such key{nearest(str(key), _KEYS)}; it has {', '.join(_KEYS)}.")
    given = values.get("compressor", "visionzip")
    arguments = dict(given) if isinstance(given, Mapping) else {"name": given}
    # Found by its name: a class that a configuration names is never imported.
    method = find_method(str(arguments.pop("name", None)))
    arguments = {key: value for key, value in arguments.items() if key not in ("_target_", "budget")}
    budget, projector = values.get("budget"), values.get("projector")
    if method.has_budget == (budget is None):
        needs = "needs a budget" if method.has_budget else "takes no budget"
        raise ConfigError(f"{KEY}.budget={budget!r}: compressor={method.name} {needs}.")
    preprocess: Any = values.get("preprocess") or "llava"
    if preprocess not in get_args(Preprocess):
        raise ConfigError(f"{KEY}.preprocess={preprocess!r}: must be one of {', '.join(get_args(Preprocess))}.")
    options = FamilyOptions(values.get("drop_padding", False), values.get("row_newline", False))
    settings = ServingSettings(
        method,
        arguments,
        None if budget is None else _budget(budget, f"{KEY}.budget"),
        preprocess,
        None if projector is None else TunedProjector.read(projector, architecture),
        options,
    )
    _check_method(settings.compressor, method.name)
    adapter_class.check_settings(config, settings.compressor, settings.options)
    return settings


def _budget(values: object, key: str) -> TokenBudget:
    if not isinstance(values, Mapping) or not values or (values.keys() - {*COUNTS}):
        raise ConfigError(f'{key}={values!r}: must be counts, as {{"num_dominant": 54, "num_contextual": 10}}.')
    return TokenBudget(values.get("num_dominant", 0), values.get("num_contextual", 0))


def _check_method(compressor: Compressor, name: str) -> None:
    """Raises ConfigError for a method that needs what a server does not have when it computes an image's tokens."""
    if compressor.reads_text:
        raise ConfigError(
            f"compressor={name} is text-aware, and vLLM computes an image's tokens without its question: {_EMBED}."
        )
    if compressor.tower_use != "whole":
        raise ConfigError(f"compressor={name} acts inside the vision tower, which vLLM runs as a whole: {_EMBED}.")
