"""Methods around a method: what is dropped merged into what is kept, outliers set aside before anything is ranked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import methods
from torch.nn import functional

import vzip
from vzip.compressors import Signal, VisionOutput
from vzip.errors import ConfigError

BUDGET = vzip.TokenBudget(3, 2)


def output(has_cls: bool = True, num_crops: int = 2, seed: int = 0) -> VisionOutput:
    make = torch.Generator().manual_seed(seed)
    rows = 20 + int(has_cls)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(num_crops, *shape, generator=make)

    return VisionOutput(
        random(rows, 8),
        has_cls,
        (4, 5),
        attention=random(20).softmax(-1),
        keys=random(rows, 6),
        project=lambda x: 2 * x,
    )


def test_six_tokens_by_hand() -> None:
    """Units: CLS, patches 1..5; FasterVLM keeps 2 and 4. Keys: 1 like 2, 3 like 4, 5 equally like both: the earlier."""
    keys = torch.tensor([[[0.0, 1.0], [2.0, 0.1], [1.0, 0.0], [0.1, 3.0], [0.0, 1.0], [1.0, 1.0]]])
    hidden = torch.tensor([[[100.0], [1.0], [10.0], [2.0], [20.0], [4.0]]])
    vision = VisionOutput(hidden, True, (1, 5), attention=torch.tensor([[0.1, 0.4, 0.0, 0.3, 0.2]]), keys=keys)
    selector = vzip.FasterVLM(vzip.TokenBudget(2, 0))
    result = vzip.MergeDropped(selector)(vision)
    assert result.source_index.tolist() == [[2, 4]] and result.place_index.tolist() == [[2, 4]]
    assert result.merge_index.tolist() == [[-1, 0, -1, 1, -1, 0]]
    assert result.tokens[0, :, 0].tolist() == [10 + (1 + 4) / 2, 20 + 2]
    mean = vzip.MergeDropped(selector, "mean")(vision)
    assert mean.tokens[0, :, 0].tolist() == [5.0, 11.0]
    # What is not valid stays dropped; where CLS is kept (DominantOnly) nothing joins it.
    blank = replace(vision, valid=torch.tensor([[True, False, True, True, True, True]]))
    assert vzip.MergeDropped(selector)(blank).merge_index.tolist() == [[-1, -1, -1, 1, -1, 0]]
    with_cls = vzip.MergeDropped(vzip.DominantOnly(vzip.TokenBudget(2, 0)))(vision)
    assert with_cls.source_index.tolist() == [[0, 2]]
    assert with_cls.merge_index.tolist() == [[-1, 1, -1, 1, 1, 1]]
    alone = vzip.MergeDropped(vzip.DominantOnly(vzip.TokenBudget(1, 0)))(vision)
    assert alone.tokens[0, :, 0].tolist() == [100.0] and alone.merge_index.tolist() == [[-1] * 6]


SELECTORS = [vzip.FasterVLM, vzip.DivPrune, vzip.Scope, vzip.VisPruner, vzip.HoloV, vzip.PruneSid, vzip.RandomTokens]


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("method", SELECTORS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_any_selector_against_a_plain_loop(method: Any, rule: Any, has_cls: bool) -> None:
    selector, vision = method(BUDGET), output(has_cls)
    merging = vzip.MergeDropped(selector, rule)
    assert merging.num_tokens(vision.shape) == selector.num_tokens(vision.shape)
    kept, got = selector(vision), merging(vision)
    assert got.source_index.tolist() == kept.source_index.tolist()
    rows = vision.hidden if selector.space == "tower" else 2 * vision.hidden
    assert vision.keys is not None
    for crop in range(2):
        places = kept.source_index[crop].tolist()
        joined: dict[int, list[int]] = {slot: [] for slot in range(len(places))}
        for unit in range(int(has_cls), vision.num_rows):
            if unit in places:
                continue
            likeness = [
                -2.0
                if has_cls and place == 0
                else float(functional.cosine_similarity(vision.keys[crop, unit], vision.keys[crop, place], dim=0))
                for place in places
            ]
            joined[likeness.index(max(likeness))].append(unit)
        for slot, place in enumerate(places):
            members = rows[crop, joined[slot]]
            own = rows[crop, place]
            if len(members):
                own = own + members.mean(0) if rule == "sum" else (own + members.sum(0)) / (1 + len(members))
            torch.testing.assert_close(got.tokens[crop, slot], own)
    alone = [merging(output_of(vision, crop)).tokens[0] for crop in range(2)]
    torch.testing.assert_close(got.tokens, torch.stack(alone))


def output_of(vision: VisionOutput, crop: int) -> VisionOutput:
    one = slice(crop, crop + 1)
    assert vision.attention is not None and vision.keys is not None
    return replace(vision, hidden=vision.hidden[one], attention=vision.attention[one], keys=vision.keys[one])


def with_outlier() -> VisionOutput:
    """Patch 3 of crop 0 has ten times the norm of others and most attention; crop 1 has no outlier."""
    vision = output()
    assert vision.attention is not None
    hidden = functional.normalize(vision.hidden, dim=-1)
    hidden[0, 1 + 3] *= 10
    attention = vision.attention.clone()
    attention[:, 3] = 0.9
    return replace(vision, hidden=hidden, attention=attention)


@pytest.mark.parametrize("method", [vzip.FasterVLM, vzip.VisionZip, vzip.VisPruner, vzip.Scope, vzip.PruneSid])
def test_an_outlier_is_not_selected_for_its_attention(method: Any) -> None:
    vision, plain = with_outlier(), method(BUDGET)
    aside = vzip.WithoutOutliers(plain)
    before, after = plain(vision), aside(vision)
    assert 4 in before.source_index[0] and 4 in before.source_index[1]
    assert 4 not in after.source_index[0], "set aside"
    assert torch.equal(before.tokens[1], after.tokens[1]), "a crop without outliers is as it was"
    assert after.tokens.shape == before.tokens.shape
    assert torch.equal(vzip.WithoutOutliers(plain, threshold=11)(vision).tokens, before.tokens)
    assert aside.reads() == plain.reads()


def test_outliers_by_hand_and_a_budget_that_needs_them() -> None:
    hidden = torch.tensor([[[9.0], [1.0], [-1.0], [2.0], [2.1], [1.0]]])
    vision = VisionOutput(hidden, True, (1, 5), attention=torch.tensor([[0.1, 0.2, 0.3, 0.5, 0.0]]))
    aside = vzip.WithoutOutliers(vzip.FasterVLM(vzip.TokenBudget(2, 0)))
    # Norms 1, 1, 2, 2.1, 1: their median is 1; twice that is no outlier, more is. CLS is not looked at.
    assert aside.outliers(vision).tolist() == [[False, False, False, True, False]]
    assert aside(vision).source_index.tolist() == [[2, 3]]
    everything = vzip.WithoutOutliers(vzip.FasterVLM(vzip.TokenBudget(5, 0)))
    assert everything(vision).source_index.tolist() == [[1, 2, 3, 4, 5]]


def test_wrappers_go_around_wrappers() -> None:
    vision = with_outlier()
    both = vzip.MergeDropped(vzip.WithoutOutliers(vzip.FasterVLM(BUDGET)))(vision)
    assert 4 not in both.source_index[0] and both.merge_index[0, 4] >= 0, "set aside, then merged"
    dropped = vzip.WithoutOutliers(vzip.MergeDropped(vzip.FasterVLM(BUDGET)))(vision)
    assert 4 not in dropped.source_index[0] and dropped.merge_index[0, 4] == -1, "shown to neither"
    assert Signal("keys") in vzip.WithoutOutliers(vzip.MergeDropped(vzip.FasterVLM(BUDGET))).reads()


REFUSED = [
    (lambda: vzip.MergeDropped(vzip.VisionZip(BUDGET)), r"compressor.of=VisionZip.*merges what it does not keep"),
    (lambda: vzip.MergeDropped(vzip.Identity()), r"compressor.of=Identity.*keeps everything"),
    (lambda: vzip.MergeDropped(vzip.MergeDropped(vzip.FasterVLM(BUDGET))), "merges what it does not keep"),
    (lambda: vzip.MergeDropped(vzip.FasterVLM(BUDGET), "summ"), r"merge_rule='summ'.*did you mean 'sum'"),  # type: ignore[arg-type]
    (lambda: vzip.MergeDropped("divprune"), r"of='divprune': must be an instance"),  # type: ignore[arg-type]
    (lambda: vzip.WithoutOutliers(vzip.DivPrune(BUDGET)), "does not rank by attention"),
    (lambda: vzip.WithoutOutliers(vzip.HoloV(BUDGET)), "projected tokens of a whole image"),
    (lambda: vzip.WithoutOutliers(vzip.FasterVLM(BUDGET), 1), "threshold=1: must be a number above 1"),
    (lambda: methods.build("merge_dropped", BUDGET, of="visionzip"), "merges what it does not keep"),
    (lambda: methods.build("merge_dropped", BUDGET, of="divprun"), r"compressor.of=divprun.*did you mean 'divprune'"),
    (lambda: methods.build("merge_dropped", BUDGET, of={"name": "scope", "alfa": 1}), "did you mean 'alpha'"),
    (lambda: methods.build("merge_dropped", BUDGET, of=3), "must be the name of a method"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_what_cannot_be_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_by_name() -> None:
    scope = methods.build("merge_dropped", BUDGET, of={"name": "scope", "alpha": 0.5})
    assert scope == vzip.MergeDropped(vzip.Scope(BUDGET, 0.5)) and type(scope) is vzip.MergeDropped
    assert methods.build("merge_dropped", BUDGET, of="random", seed=3).of == vzip.RandomTokens(BUDGET, 3)
    assert methods.build("without_outliers", BUDGET) == vzip.WithoutOutliers(vzip.VisionZip(BUDGET))
