"""Floors that a method must beat: pooling against torch and plain loops, the blank image against a blank image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from scripts.make_random_model import build
from tests.families import FAMILIES
from torch.nn import functional

import vzip
from vzip.analysis.kept import draw_kept
from vzip.compressors import VisionOutput, VisionShape
from vzip.errors import ConfigError
from vzip.models.towers.cache import TowerCache

BUDGET = vzip.TokenBudget(6, 3)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def vision_output(has_cls: bool, grid: tuple[int, int], num_crops: int = 2) -> VisionOutput:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_crops, grid[0] * grid[1] + has_cls, 5, generator=generator, dtype=torch.float64)
    return VisionOutput(hidden, has_cls, grid)


def pooled(num_tokens: int, vision: VisionOutput) -> vzip.CompressedTokens:
    return vzip.Pooled(vzip.TokenBudget(num_tokens, 0))(vision)


@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no_cls"])
@pytest.mark.parametrize(
    ("grid", "cells"),
    [
        ((24, 24), (8, 8)),
        ((24, 24), (12, 16)),  # 12 rows divide 24, 16 columns do not
        ((24, 24), (8, 16)),
        ((24, 24), (1, 1)),
        ((24, 24), (24, 24)),
        ((7, 9), (3, 3)),
        ((7, 9), (4, 5)),
        ((4, 10), (2, 5)),
        ((10, 4), (5, 2)),
        ((1, 9), (1, 7)),
    ],
)
def test_pooling_equals_plain_loops_and_torchs_where_cells_are_equal(grid, cells, has_cls):
    vision = vision_output(has_cls, grid)
    result = pooled(cells[0] * cells[1], vision)
    patches = vision.hidden[:, int(has_cls) :]
    members: dict[tuple[int, int], list[int]] = {}
    for patch in range(grid[0] * grid[1]):
        row, col = divmod(patch, grid[1])
        members.setdefault((row * cells[0] // grid[0], col * cells[1] // grid[1]), []).append(patch)
    assert list(members) == [(row, col) for row in range(cells[0]) for col in range(cells[1])]
    expected = torch.stack([patches[:, own].mean(dim=1) for own in members.values()], dim=1)
    torch.testing.assert_close(result.tokens, expected)
    for token, (place, own) in enumerate(
        zip((result.places[0] - int(has_cls)).tolist(), members.values(), strict=True)
    ):
        row, col = divmod(place, grid[1])
        rows, cols = sorted({patch // grid[1] for patch in own}), sorted({patch % grid[1] for patch in own})
        assert (row, col) == (rows[(len(rows) - 1) // 2], cols[(len(cols) - 1) // 2]), "the middle of its cell"
        merged = (result.merge_index[0] == token).nonzero().flatten() - int(has_cls)
        assert sorted([*merged.tolist(), place]) == own
    if grid[0] % cells[0] == grid[1] % cells[1] == 0:
        image = patches.transpose(1, 2).unflatten(2, grid)
        theirs = functional.adaptive_avg_pool2d(image, cells).flatten(2).transpose(1, 2)
        torch.testing.assert_close(result.tokens, theirs)


def test_of_several_grids_the_one_of_the_images_aspect():
    """Told by the first token: of a one-hot of patches it is 1 / the size of its cell there."""
    for grid, num_tokens, (rows, cols) in (
        ((24, 24), 32, (4, 8)),
        ((24, 24), 36, (6, 6)),
        ((12, 48), 64, (4, 16)),
        ((48, 12), 64, (16, 4)),
        ((2, 40), 40, (1, 40)),
    ):
        hidden = torch.eye(grid[0] * grid[1])[None]
        first = pooled(num_tokens, VisionOutput(hidden, False, grid)).tokens[0, 0].unflatten(0, grid) > 0
        height, width = int(first.any(dim=1).sum()), int(first.any(dim=0).sum())
        assert (height, width) == (-(-grid[0] // rows), -(-grid[1] // cols)), (grid, num_tokens)


def test_a_budget_that_is_no_smaller_grid_is_refused_before_anything_runs():
    shape = VisionShape("image", 1, (24, 24), True, 576)
    for num_tokens, below, above in ((29, 28, 30), (37, 36, 38), (575, 552, 576), (62, 60, 63)):
        with pytest.raises(
            ConfigError,
            match=rf"num_contextual = {num_tokens} .*24 x 24 patches.* allowed are {below} and {above}: change the",
        ):
            vzip.Pooled(vzip.TokenBudget(num_tokens, 0)).num_tokens(shape)
    with pytest.raises(ConfigError, match="= 577 visual tokens per crop: the vision tower has 576"):
        vzip.Pooled(vzip.TokenBudget(577, 0)).num_tokens(shape)
    small = replace(shape, grid=(3, 5), num_vanilla=15, fixed=False)
    assert vzip.Pooled(vzip.TokenBudget(17, 0)).num_tokens(small) == 15, "all that a small image has"


@each_family
@torch.no_grad()
def test_a_zero_image_is_the_blank_one_whatever_is_shown(family):
    """Also where patches are mined from a sharper image, and where the tower's outputs are kept between methods."""
    model, inputs = family.build(), family.inputs(2)
    blank = {n: torch.zeros_like(v) if n == family.pixels_name else v for n, v in inputs.items()}
    uniform = vzip.CompressedVlm(model, vzip.UniformTokens(BUDGET))
    seen, expected = family.encode(uniform, inputs), family.encode(uniform, blank)
    vlm = vzip.CompressedVlm(model, vzip.ZeroImage(BUDGET))
    vlm.adapter.tower_cache = cache = TowerCache(1.0)
    for method, wanted in ((vzip.UniformTokens, seen), (vzip.ZeroImage, expected), (vzip.UniformTokens, seen)):
        vlm.compressor = method(BUDGET)
        for ours, theirs in zip(family.encode(vlm, inputs), wanted, strict=True):
            assert torch.equal(ours, theirs), method
    assert cache.num_misses == 2 * cache.num_hits > 0, "the third method's is the first one's"
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected, strict=True))


def test_what_is_drawn_of_a_zero_image_is_blank():
    model, processor = build("llava")
    image = Image.effect_noise((300, 300), 80).convert("RGB")
    drawn = draw_kept(vzip.CompressedVlm(model, vzip.ZeroImage(BUDGET), processor), image)
    other = Image.new("RGB", (300, 300), "red")
    assert drawn.tobytes() == draw_kept(vzip.CompressedVlm(model, vzip.ZeroImage(BUDGET), processor), other).tobytes()
