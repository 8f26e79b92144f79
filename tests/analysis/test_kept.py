"""Overlays drawn through a wrapper: what is bright is what the compressor kept, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scripts.make_random_model import FAMILIES, build

import vzip
from vzip.analysis.kept import draw_kept
from vzip.analysis.overlay import DIMMED

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
BUDGET = vzip.TokenBudget(5, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_patches_are_bright(family: str) -> None:
    vlm = vzip.CompressedVlm(*_with(family, vzip.VisionZip(BUDGET)))
    sheet = draw_kept(vlm, PICTURE)
    seen = draw_kept(vzip.CompressedVlm(vlm.model, vzip.Identity(), vlm.processor), PICTURE)
    assert sheet.size == (2 * seen.width + 8, seen.height)
    inputs = vlm.preprocess_images([PICTURE])
    with torch.no_grad():
        visual = vlm.adapter.read_inputs(**inputs)
        ((_, vision),) = vlm.adapter.image_outputs(visual, vlm.compressor.reads())
        crop = vlm.adapter.overview_index(visual.images[0])
        kept = vlm.compressor(vision).source_index[crop] - int(vision.has_cls)
    rows, cols = vision.grid
    bright, plain = np.asarray(sheet, float)[:, : seen.width], np.asarray(seen, float)
    side = seen.width // cols
    for patch in range(rows * cols):
        y, x = patch // cols * side + side // 2, patch % cols * side + side // 2
        expected = plain[y, x] * (1.0 if patch in kept else DIMMED)
        assert np.abs(bright[y, x] - expected).max() <= 1, (patch, patch in kept)
    assert (seen.width // side, seen.height // side) == (cols, rows)


def _with(family: str, compressor: vzip.Compressor) -> tuple:
    model, processor = build(family)
    return model, compressor, processor
