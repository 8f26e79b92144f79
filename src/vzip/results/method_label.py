"""What tells the methods of several runs apart, in as few words as do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vzip.installed import checkout
from vzip.keys import show
from vzip.option_files import COUNTS, counted_budget, is_fraction, option_values
from vzip.results.record import Run, is_vanilla, method_of, visual_tokens_of

VANILLA = "vanilla"
# Of a model's settings: what names it, and what changes no answer.
_NOT_OF_MODEL = ("name", "name_or_path", "assembled_from", "device_map", "num_tower_tokens")
_NOT_OF_METHOD = ("name", "_target_", "budget", "seed")
# How many tokens a pruner keeps: points of one line. Every pruner's ``set_by_budget``.
SIZES = ("keep", "num_claimed", "scale", "bias")
# Weights on top of the model, told by a word as long as there are no two of them.
_ON_TOP = {"projector": "tuned", "adapter_path": "LoRA adapter"}
_WEIGHTS = ("projector", "projector_sha256")  # which: of each budget its own are one method, as the paper's tuned rows


def method_labels(runs: Sequence[Run], asked: Mapping[str, Any] | None = None) -> list[str]:
    """A label a run: the methods' classes, and which settings are not as their option's file has them.

    Two runs have one label only if they differ in nothing but budget, weights tuned for it, seed, and where and how
    fast they ran. Settings that do not tell (paths of weights, settings of a run that was not configured) are added
    where they must.

    Args:
        runs: of one model.
        asked: a configuration whose ``model`` and ``eval`` count as usual; without, their options' files do.
    """
    directory = checkout() / "configs"
    told = [_changed(run.record, asked or {}, directory) for run in runs]
    labels = [
        ", ".join([_base(run), *_words(own, more.pop("projector_compressors", None) is not None)])
        for run, (own, more) in zip(runs, told, strict=True)
    ]
    hidden = [own | more | _hidden(run.record) for run, (own, more) in zip(runs, told, strict=True)]
    weights: dict[tuple[object, ...], set[str]] = {}
    for label, run, own in zip(labels, runs, hidden, strict=True):
        of_place = weights.setdefault((label, visual_tokens_of(run.record)), set())
        of_place.add(str([own.get(key) for key in _WEIGHTS]))
    several = {label for (label, _), found in weights.items() if len(found) > 1}
    for label, own in zip(labels, hidden, strict=True):
        for key in _WEIGHTS if label not in several else ():
            own.pop(key, None)
    places: list[tuple[object, ...]] = [(label,) for label in labels]
    labels = _set_apart(labels, places, hidden)
    sizes = [_sizes(run.record) for run in runs]
    places = [(label, visual_tokens_of(run.record)) for label, run in zip(labels, runs, strict=True)]
    return _set_apart(labels, places, sizes)


def _set_apart(
    labels: Sequence[str], places: Sequence[tuple[object, ...]], settings: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Labels of runs at one place with what differs between these added."""
    by_place: dict[tuple[object, ...], list[int]] = {}
    for number, place in enumerate(places):
        by_place.setdefault(place, []).append(number)
    found = list(labels)
    for numbers in by_place.values():
        keys = dict.fromkeys(key for number in numbers for key in settings[number])
        apart = [key for key in keys if len({_shown(settings[n].get(key)) for n in numbers}) > 1]
        for number in numbers:
            more = [f"{key}={_shown(settings[number].get(key))}" for key in apart]
            found[number] = ", ".join([labels[number], *more])
    return found


def _base(run: Run) -> str:
    return VANILLA if is_vanilla(run.record) else method_of(run.record).removeprefix("Identity+")


def _words(changed: Mapping[str, Any], for_several: bool) -> list[str]:
    """``for_several``: the weights are tuned once for several budgets."""
    on_top = _ON_TOP | ({"projector": "tuned for several budgets"} if for_several else {})
    return [on_top[key] if key in on_top and value else f"{key}={_shown(value)}" for key, value in changed.items()]


def _changed(
    record: Mapping[str, Any], asked: Mapping[str, Any], directory: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that are not as their option's file, or what was asked for, has them; and those that it lacks."""
    config = record.get("config") or {}
    changed: dict[str, Any] = {}
    unknown: dict[str, Any] = {}

    def add(own: Mapping[str, Any], usual: Mapping[str, Any], left_out: Sequence[str] = ()) -> None:
        for key in own.keys() - set(left_out):
            if key not in usual:
                unknown[key] = own[key]
            elif own[key] != usual[key] and "${" not in str(usual[key]):
                changed[key] = own[key]

    def usual_of(group: str, own: Mapping[str, Any]) -> Mapping[str, Any]:
        return asked.get(group) or option_values(directory, group, str(own.get("name")))

    for group, left_out in (("compressor", ()), ("pruner", SIZES)):
        own = config.get(group) or {}
        add(own, option_values(directory, group, str(own.get("name"))), (*_NOT_OF_METHOD, *left_out))
        if "budget" in own and group == "compressor":
            changed |= _split(config.get("budget") or {}, directory)
    model = config.get("model") or {}
    add(model, dict.fromkeys(_ON_TOP) | dict(usual_of("model", model)), (*_NOT_OF_MODEL, *_digests(model)))
    evaluation = config.get("eval") or {}
    add(evaluation.get("gen_kwargs") or {}, usual_of("eval", evaluation).get("gen_kwargs") or {})
    return dict(sorted(changed.items())), unknown


def _digests(model: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value)[:8] for key, value in model.items() if key.endswith("_sha256") and value}


def _split(budget: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """How a budget is split where that is not as for every number of tokens, and between what."""
    scope = {} if budget.get("scope", "crop") == "crop" else {"scope": budget["scope"]}
    counts = [budget[key] for key in COUNTS if isinstance(budget.get(key), int)]
    if len(counts) < len(COUNTS):
        return scope
    name = f"{sum(counts)}tok"
    usual = option_values(directory, "budget", name) or counted_budget(name) or {}
    return {**({} if all(usual.get(k) == budget[k] for k in COUNTS) else {"num_contextual": counts[1]}), **scope}


def _hidden(record: Mapping[str, Any]) -> dict[str, Any]:
    """What tells runs apart that nobody wants to read: option, digests of weights, a method that was not configured."""
    config = record.get("config") or {}
    named = {f"{group}.name": (config.get(group) or {}).get("name", "none") for group in ("compressor", "pruner")}
    named |= _digests(config.get("model") or {})
    budget = config.get("budget") or {}
    if "compressor" in config:  # a fraction has no usual split
        return named | ({"contextual": budget.get("contextual")} if is_fraction(budget) else {})
    texts = [str(own["settings"]) for own in (record["compressor"], record.get("pruner") or {}) if own.get("settings")]
    # Without budget and seed: of ``VisionZip(budget=TokenBudget(num_dominant=54, num_contextual=10), score='key')``.
    return {"settings": " ".join(re.sub(r"(budget=\w+\([^()]*\)|seed=\d+)(, )?", "", text) for text in texts)}


def _sizes(record: Mapping[str, Any]) -> dict[str, Any]:
    own = (record.get("config") or {}).get("pruner") or {}
    return {key: own[key] for key in SIZES if key in own}


def _shown(value: Any) -> str:
    """A setting; of a method with settings its name and these."""
    if not isinstance(value, Mapping):
        return show(value)
    others = ", ".join(f"{key}={_shown(own)}" for key, own in value.items() if key != "name")
    return f"{value.get('name')}({others})" if others else str(value.get("name"))
