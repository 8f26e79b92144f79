"""What tells the lines of a figure apart, on records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.records import record

from vzip import pruners
from vzip.installed import checkout
from vzip.option_files import option_values
from vzip.results.method_label import SIZES, method_labels
from vzip.results.record import Run

CONFIGS = checkout() / "configs"
BUDGET = {"name": "64tok", "num_dominant": 54, "num_contextual": 10, "scope": "crop"}


def run(name: str = "VisionZip", tokens: int = 64, option: str = "visionzip", **change: Any) -> Run:
    """As ``eval.py`` records it; ``change`` sets keys of the configuration's groups."""
    config = {
        "compressor": {**option_values(CONFIGS, "compressor", option), "budget": {}, "seed": 0},
        "pruner": {"name": "none"},
        "budget": BUDGET,
        "model": option_values(CONFIGS, "model", "tiny"),
        "eval": option_values(CONFIGS, "eval", "scenes"),
    }
    config |= {group: {**config[group], **own} for group, own in change.items() if group in config}
    counts = {"budget_per_crop": tokens, "measured_min": tokens, "measured_max": tokens, "num_images": 9}
    rest = {key: value for key, value in change.items() if key not in config}
    return Run(Path("r"), record(name, config=config, visual_tokens=counts, **rest))


def vanilla(**change: Any) -> Run:
    return run("Identity", 576, "none", **change)


def test_the_options_own_settings_are_not_told_and_others_are() -> None:
    runs = [
        run(),
        run(compressor={"seed": 4}),
        run(compressor={"merge_rule": "mean"}),
        run("WithoutOutliers", option="without_outliers", compressor={"of": {"name": "scope", "alpha": 0.5}}),
        run(model={"positions": "original"}),
        run(budget={"num_dominant": 64, "num_contextual": 0}),
        run(budget={"num_dominant": 40, "num_contextual": 8}),
        run(budget={"scope": "image"}),
        run(eval={"gen_kwargs": {"max_new_tokens": 5}}),
        run(model={"projector": "/runs/a/final"}),
        vanilla(),
        vanilla(model={"quantization": "nf4"}),
    ]
    assert method_labels(runs) == [
        "VisionZip",
        "VisionZip",
        "VisionZip, merge_rule=mean",
        "WithoutOutliers, of=scope(alpha=0.5)",
        "VisionZip, positions=original",
        "VisionZip, num_contextual=0",
        "VisionZip",  # 48tok's own split
        "VisionZip, scope=image",
        "VisionZip, max_new_tokens=5",
        "VisionZip, tuned",
        "vanilla",
        "vanilla, quantization=nf4",
    ]


def test_what_was_asked_for_is_usual() -> None:
    asked = {"model": {**option_values(CONFIGS, "model", "tiny"), "quantization": "nf4"}}
    assert method_labels([vanilla(), vanilla(model={"quantization": "nf4"})], asked) == [
        "vanilla, quantization=null",
        "vanilla",
    ]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([run(model={"projector": p}) for p in ("a", "b")], ["tuned, projector=a", "tuned, projector=b"]),
        (
            [run(model={"projector": "a", "projector_sha256": s * 64}) for s in ("1", "2")],
            ["tuned, projector_sha256=11111111", "tuned, projector_sha256=22222222"],
        ),
        (
            [run(compressor={"name": n, "own": v}) for n, v in (("mine", 1), ("mine", 2))],
            ["own=1", "own=2"],  # an option whose file is not there
        ),
        (
            [
                Run(Path("r"), {**record(config=None), "compressor": {"name": "VisionZip", "settings": text}})
                for text in ("V(budget=B(n=1), x=1)", "V(budget=B(n=2), x=2)")
            ],
            ["settings=V(x=1)", "settings=V(x=2)"],
        ),
    ],
)
def test_settings_that_nobody_reads_are_told_where_they_must_be(runs: list[Run], words: list[str]) -> None:
    assert method_labels(runs) == [f"VisionZip, {word}" for word in words]
    assert method_labels(runs[:1]) == [f"VisionZip{', tuned' if 'tuned' in words[0] else ''}"]


def test_weights_of_each_budgets_own_are_one_line_and_those_for_several_another() -> None:
    def tuned(tokens: int, name: str, **more: Any) -> Run:
        return run(tokens=tokens, model={"projector": name, "projector_sha256": name * 64, **more})

    own = [tuned(32, "1"), tuned(64, "2")]
    both = [tuned(tokens, "3", projector_compressors=["VisionZip(32)", "VisionZip(64)"]) for tokens in (32, 64)]
    assert method_labels([*own, *both]) == ["VisionZip, tuned"] * 2 + ["VisionZip, tuned for several budgets"] * 2
    words = [f"VisionZip, tuned, projector={name}, projector_sha256={name * 8}" for name in "124"]
    assert method_labels([*own, tuned(64, "4")]) == words, "two of one budget"


def test_a_pruners_sizes_are_points_of_one_line_unless_they_give_as_many_tokens() -> None:
    def pruned(keep: Any, tokens: float, **more: Any) -> Run:
        own = {**option_values(CONFIGS, "pruner", "pyramiddrop"), "keep": keep, **more}
        told = {"name": "PyramidDrop", "average_min": tokens, "average_max": tokens}
        return Run(Path("r"), {**vanilla(pruner=own).record, "pruner": told})

    apart = [pruned([0.5, 0.25, 0.125], 300), pruned([0.4, 0.2, 0.1], 200)]
    assert method_labels(apart) == ["PyramidDrop", "PyramidDrop"]
    alike = [*apart, pruned([0.3, 0.3, 0.1], 200)]
    assert method_labels(alike) == [
        "PyramidDrop",
        "PyramidDrop, keep=[0.4, 0.2, 0.1]",
        "PyramidDrop, keep=[0.3, 0.3, 0.1]",
    ]
    assert method_labels([pruned([0.4], 200, layers=[16])]) == ["PyramidDrop, layers=[16]"]


def test_every_pruners_sizes_are_known() -> None:
    classes = [getattr(pruners, name) for name in pruners.__all__]
    found = {key for each in classes for key in getattr(each, "set_by_budget", ())}
    assert found == set(SIZES)
