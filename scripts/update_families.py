"""Writes which family is served how into docs/families.md, out of what the code itself takes and refuses.

python scripts/update_families.py
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vzip
from vzip.bench import shapes
from vzip.bench.visuals import visuals_of
from vzip.errors import VzipError
from vzip.methods import find_budget, method_files
from vzip.models.families import (
    Adapter,
    FamilyOptions,
    PublishedVideoLlavaAdapter,
    adapter_class_for_config,
    adapter_for_model,
)
from vzip.option_files import option_values, options

ROOT = Path(__file__).resolve().parent.parent
BUDGET = vzip.TokenBudget(*(find_budget("64tok") or ()))  # fits every family; a method may allow few counts
PAGES = {"docs/families.md": ("families", "compressors", "pruners")}
YES = "yes"


class Reasons:
    """Refusals, numbered in the order in which they are met."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def cell(self, check: Callable[..., object], *given: Any) -> str:
        """``yes`` where the check passes what it is given, or the number of what was said instead."""
        try:
            check(*given)
        except VzipError as error:
            return f"no ({self.numbers.setdefault(' '.join(str(error).split()), len(self.numbers) + 1)})"
        return YES

    def lines(self) -> str:
        """The list that the numbers point to."""
        return "\n".join(f"{number}. {text}" for text, number in self.numbers.items())


def published() -> dict[type[Adapter], list[shapes.BenchModel]]:
    """The published sizes of each family, in the order of ``configs/model``'s names."""
    found: dict[type[Adapter], list[shapes.BenchModel]] = {}
    for name in sorted(shapes.SHAPES):
        model = shapes.resolve(name)
        if not model.tower_only and name != "llava15_7b_untuned":  # a directory that one makes
            found.setdefault(adapter_class_for_config(model.config), []).append(model)
    return found


def matrix(group: str, check: Callable[[type[Adapter], Any, Any], object]) -> str:
    """A table with a row a method and a column a family, and what was said where a method is refused."""
    families, reasons = published(), Reasons()
    title = [f"`{group}=`", *(_name(adapter) for adapter in families)]
    rows = []
    for name, method in method_files(group).items():
        if group == "compressor" and not method.has_budget:
            continue
        # A text model of the hub's would have to be read; without it the language model's own embeddings do.
        settings = {"text_encoder": None} if "text_encoder" in method.settings else {}
        built = method.build(BUDGET, **settings) if group == "compressor" else method.build()
        shown = "".join(f", `compressor.{key}=null`" for key in settings)
        cells = [reasons.cell(check, adapter, model.config, built) for adapter, (model, *_) in families.items()]
        rows.append([f"`{name}`{shown}", *cells])
    return f"{_table(title, rows)}\n\n{reasons.lines()}".rstrip()


def compressors() -> str:
    """Which compressor serves which family, with the checks that run before any weight is read."""
    return matrix("compressor", lambda adapter, config, built: adapter.check_settings(config, built, FamilyOptions()))


def pruners() -> str:
    """Which pruner serves which family."""
    return matrix("pruner", lambda adapter, config, built: adapter.check_pruner(config, built))


def families() -> str:
    """What of each family is served, and its visual tokens."""
    rows = []
    for adapter, models in published().items():
        configs = ROOT / "configs"
        names = [model.name for model in models if model.name in options(configs, "model")]
        checkpoints = [str(option_values(configs, "model", name)["name_or_path"]) for name in names]
        built = [method.build() for method in method_files("pruner").values()]
        pruned = sum(Reasons().cell(adapter.check_pruner, models[0].config, pruner) == YES for pruner in built)
        rows.append(
            [
                _name(adapter),
                "<br>".join(f"`{name}`: {checkpoint}" for name, checkpoint in zip(names, checkpoints, strict=True)),
                _tokens(models[0]),
                "yes" if adapter.has_video else "no",
                "on images and videos" if adapter.learns_videos else "on images",
                "all" if pruned == len(built) else f"{pruned} of {len(built)}" if pruned else "no",
            ]
        )
    return _table(["family", "`model=`: checkpoint", "visual tokens", "videos", "training", "pruners"], rows)


def _tokens(model: shapes.BenchModel) -> str:
    shown = copy.deepcopy(model)
    shown.config.get_text_config().num_hidden_layers = 1  # nothing but the vision tower is looked at
    adapter = adapter_for_model(shapes.build_meta(shown, torch.float32))
    visuals = visuals_of(adapter, model.num_crops)
    counts = find_budget(model.default_budget)
    assert counts is not None
    vanilla, kept = (
        sum(method.num_visual_tokens(shape) for shape in visuals.shapes())
        for method in (vzip.Identity(), vzip.VisionZip(vzip.TokenBudget(*counts)))
    )
    return f"{visuals.describe()}: {vanilla}, with `budget={model.default_budget}` {kept}"


def _name(adapter: type[Adapter]) -> str:
    folder = str(adapter.__module__.split(".")[-2])
    return f"{folder}, as published" if adapter is PublishedVideoLlavaAdapter else folder


def _table(title: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (title, ["---"] * len(title), *rows))


def updated(text: str, part: str) -> str:
    """A page with its part of that name written anew."""
    marked = re.compile(rf"(<!-- {part}: .*? -->\n).*?(<!-- end of {part} -->)", re.DOTALL)
    text, count = marked.subn(lambda m: f"{m[1]}\n{PARTS[part]()}\n\n{m[2]}", text)
    if count != 1:
        raise SystemExit(f"{count} places for {part}; exactly one is expected")
    return text


PARTS: dict[str, Callable[[], str]] = {"families": families, "compressors": compressors, "pruners": pruners}


def main() -> None:
    for page, parts in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for part in parts:
            text = updated(text, part)
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
