"""What a compressor keeps and merges, as numbers: those of a direct call of it, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scripts.make_random_model import FAMILIES, build

import vzip
from vzip.analysis.kept import draw_kept
from vzip.analysis.kept_patches import kept_map, kept_patches

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
BUDGET = vzip.TokenBudget(5, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_and_merged_are_the_compressors(family: str) -> None:
    model, processor = build(family)
    compressor = vzip.VisionZip(BUDGET)
    vlm = vzip.CompressedVlm(model, compressor, processor)
    found = kept_map(vlm, PICTURE, compressor)
    with torch.no_grad():
        visual = vlm.adapter.read_inputs(**vlm.preprocess_images([PICTURE]))
        ((_, vision),) = vlm.adapter.image_outputs(visual, compressor.reads())
        tokens = compressor(vision)
    crop, first = vlm.adapter.overview_index(visual.images[0]), int(vision.has_cls)
    assert found.grid == vision.grid
    assert found.kept == [unit - first for unit in tokens.source_index[crop].tolist() if unit >= first]
    slots = tokens.merge_index[crop].tolist()
    expected = []
    for slot in range(BUDGET.num_contextual):
        members = [unit - first for unit, own in enumerate(slots) if own == slot]
        expected.append((int(tokens.place_index[crop, tokens.source_index.shape[1] + slot]) - first, members))
    assert found.groups == expected
    assert all(target in members for target, members in found.groups)
    plain = draw_kept(vzip.CompressedVlm(model, vzip.Identity(), processor), PICTURE)
    assert np.array_equal(np.asarray(found.seen), np.asarray(plain))
    every, num_patches = kept_patches(vlm, PICTURE, compressor)
    here = range(crop * vision.num_patches, (crop + 1) * vision.num_patches)
    assert {patch - here.start for patch in every if patch in here} == set(found.kept)
    assert num_patches == visual.images[0].num_crops * vision.num_patches


def test_dropped_patches_that_join_kept_ones_are_groups_without_a_target_among_them() -> None:
    model, processor = build("llava")
    compressor = vzip.MergeDropped(vzip.DivPrune(vzip.TokenBudget(4, 0)))
    vlm = vzip.CompressedVlm(model, compressor, processor)
    found = kept_map(vlm, PICTURE, compressor)
    members = [patch for _, inside in found.groups for patch in inside]
    assert len(members) == len(set(members)) and not set(members) & set(found.kept)
    assert {target for target, _ in found.groups} <= set(found.kept)
    rows, cols = found.grid
    assert len(members) + len(found.kept) == rows * cols
