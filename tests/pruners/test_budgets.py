"""``compressor=none budget=64tok``: a pruner's arguments follow from its average over the layers, by its own rule."""

from __future__ import annotations

import pytest

import vzip
from vzip.errors import ConfigError
from vzip.pruners.stages import nearest_count, shrinking_counts


@pytest.mark.parametrize(
    ("budget", "keep"),
    [(192, 166), (128, 98), (64, 30)],  # K=2: 166.4, 98.1 and 29.9 by the formula
)
def test_fastv_keeps_what_its_authors_formula_says(budget: int, keep: int) -> None:
    assert vzip.FastV(budget=budget).schedule(576, 32) == vzip.FastV(keep=keep).schedule(576, 32)


@pytest.mark.parametrize("budget", [192, 128, 64])
def test_pyramiddrop_finds_the_shares_that_its_author_names(budget: int) -> None:
    """x = 0.5605, 0.421 and 0.1927 at layers 2, 8 and 16."""
    x = {192: 0.5605, 128: 0.421, 64: 0.1927}[budget]
    theirs = vzip.PyramidDrop([2, 8, 16], [x, round(x**2, 4), round(x**3, 4)]).average(576, 32)
    average = vzip.PyramidDrop([2, 8, 16], budget=budget).average(576, 32)
    assert average is not None and theirs is not None
    assert abs(average - budget) <= abs(theirs - budget) < 0.2


def test_by_hand() -> None:
    """Of 4 layers one sees all 10: (10 + 3 * 2) / 4 = 4; halves round up; x = 0.5 of 8 at two of three layers."""
    assert nearest_count(4, 10, 1, 4) == 2
    assert nearest_count(5, 9, 2, 4) == 1
    assert shrinking_counts(5, 8, (1, 2), 3) == [4, 3]  # x = 0.6125: 8 + 4.9 + 3.001 rounded down is 15


def test_dart_claims_in_equal_parts_rounded_down() -> None:
    """(64 * 32 - 2 * 576) / 30 = 29.9: 4 pivots of the image and 26 claims, of which 8 pivots share 24."""
    assert vzip.DART(budget=64).schedule(576, 32) == [576] * 2 + [28] * 30


@pytest.mark.parametrize(
    ("pruner", "budget", "settings"),
    [
        (vzip.SparseVLM, 64, {"keep": [66, 30, 17]}),
        (vzip.SparseVLM, 128, {"keep": [303, 110, 36]}),
        (vzip.SparseVLMPlus, 96, {"keep": [246, 54, 28]}),
    ],
)
def test_sparsevlm_has_published_schedules_alone(pruner: type, budget: int, settings: dict[str, list[int]]) -> None:
    assert pruner(budget=budget).schedule(576, 32) == pruner(**settings).schedule(576, 32)
    with pytest.raises(ConfigError, match=r"budget=100tok .* published settings for 192tok, 128tok"):
        pruner(budget=100)
    with pytest.raises(ConfigError, match="images of 576 visual tokens, this model's have 729"):
        pruner(budget=64).schedule(729, 32)


def test_sparsevlm_by_rank_has_no_schedule_but_published_settings() -> None:
    assert vzip.SparseVLMByRank(budget=192).of_budget(576) == (13.5, 0.0)
    assert vzip.SparseVLMByRank(budget=192).schedule(576, 32) is None


@pytest.mark.parametrize(
    "pruner", [vzip.FastV(budget=64), vzip.DART(budget=64), vzip.SparseVLM(budget=64), vzip.PyramidDrop(budget=64)]
)
def test_an_image_with_fewer_keeps_all(pruner: vzip.Pruner) -> None:
    assert pruner.schedule(50, 32) == [50] * 32


@pytest.mark.parametrize(
    ("pruner", "smallest"),
    [
        (vzip.FastV(budget=30), "36.9"),  # (2 * 576 + 30 * 1) / 32
        (vzip.PyramidDrop(budget=64), "144.8"),  # (8 * 576 + 24) / 32
        (vzip.DART(budget=40), "47.2"),  # (2 * 576 + 30 * 12) / 32
    ],
)
def test_below_its_floor_the_smallest_average_is_named(pruner: vzip.Pruner, smallest: str) -> None:
    with pytest.raises(ConfigError, match=rf"first [28] see all 576 .* cannot be below {smallest}"):
        pruner.schedule(576, 32)
