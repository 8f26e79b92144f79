"""What a compressor keeps and merges, as numbers: those of a direct call of it, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scripts.make_random_model import FAMILIES, build

import vzip
from vzip.analysis.kept import draw_kept
from vzip.analysis.kept_map import kept_map
from vzip.analysis.kept_patches import kept_patches

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
BUDGET = vzip.TokenBudget(5, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_and_merged_are_the_compressors(family: str) -> None:
    model, processor = build(family)
    compressor = vzip.VisionZip(BUDGET)
    vlm = vzip.CompressedVlm(model, compressor, processor)
    found = kept_map(vlm, PICTURE)
    with torch.no_grad():
        visual = vlm.adapter.read_inputs(**vlm.preprocess_images([PICTURE]))
        ((_, vision),) = vlm.adapter.image_outputs(visual, compressor.reads())
        tokens = compressor(vision)
    crop, first = vlm.adapter.overview_index(visual.images[0]), int(vision.has_cls)
    assert found.kept.shape == found.group.shape == vision.grid
    kept, group = found.kept.flatten().tolist(), found.group.flatten().tolist()
    sources, slots = tokens.source_index[crop].tolist(), tokens.merge_index[crop].tolist()
    for unit in range(first, vision.num_rows):
        assert kept[unit - first] == (unit in sources) and group[unit - first] == slots[unit]
    assert found.targets == [unit - first for unit in tokens.place_index[crop, tokens.source_index.shape[1] :].tolist()]
    assert [group[target] for target in found.targets] == list(range(BUDGET.num_contextual))
    plain = draw_kept(vzip.CompressedVlm(model, vzip.Identity(), processor), PICTURE)
    assert np.array_equal(np.asarray(found.image), np.asarray(plain))
    every, num_patches = kept_patches(vlm, PICTURE, compressor)
    here = range(crop * vision.num_patches, (crop + 1) * vision.num_patches)
    assert {patch - here.start for patch in every if patch in here} == set(np.flatnonzero(found.kept).tolist())
    assert num_patches == visual.images[0].num_crops * vision.num_patches


def test_dropped_patches_join_kept_ones() -> None:
    model, processor = build("llava")
    compressor = vzip.MergeDropped(vzip.DivPrune(vzip.TokenBudget(4, 0)))
    found = kept_map(vzip.CompressedVlm(model, compressor, processor), PICTURE)
    kept, group = found.kept.flatten(), found.group.flatten()
    assert ((group >= 0) ^ kept).all(), "every patch is kept or joins one"
    assert all(kept[target] for target in found.targets) and len(set(found.targets)) == len(found.targets)


def test_of_a_method_of_the_whole_image_all_patches_are_there() -> None:
    model, processor = build("llava_next")
    found = kept_map(vzip.CompressedVlm(model, vzip.Identity(), processor), PICTURE)
    assert found.kept.all() and not found.targets
