"""The attention of a patch against Hugging Face's eager maps; which patch a point is in against a plain search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scripts.make_random_model import build
from tests import tiny

import vzip
from vzip.analysis.patch_attention import PatchAttention, patch_at, patch_attention
from vzip.errors import ConfigError, UnsupportedModelError


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_rows_are_those_of_the_eager_maps_without_cls(tower: str) -> None:
    model = tiny.llava(tower, "default" if tower == "clip" else "full")
    vlm = vzip.CompressedVlm(model, vzip.Identity(), tiny.processor())
    image = Image.effect_noise((90, 60), 90).convert("RGB")
    rows = patch_attention(vlm, image).rows
    with torch.no_grad():
        pixels = vlm.preprocess_images([image])["pixel_values"]
        twin = type(model.model.vision_tower)._from_config(
            model.config.vision_config, attn_implementation="eager", dtype=torch.float32
        )
        twin.load_state_dict(model.model.vision_tower.state_dict())
        maps = twin.eval()(pixels, output_attentions=True).attentions[vlm.adapter.select_layer]
    has_cls = int(tower == "clip")
    assert rows.shape == (tiny.NUM_PATCHES, tiny.NUM_PATCHES)
    for patch in (0, 1, 8, 63):  # one off would be the neighbour's row, or CLS's
        expected = maps[0, :, patch + has_cls, has_cls:].double().mean(dim=0)
        torch.testing.assert_close(rows[patch].double(), expected / expected.sum(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(336, 336), (318, 318), (1000, 500), (97, 411)])
@pytest.mark.parametrize("grid", [(24, 24), (6, 11)])
def test_the_patch_under_a_point(size: tuple[int, int], grid: tuple[int, int]) -> None:
    width, height = size
    for patch in range(grid[0] * grid[1]):
        row, col = divmod(patch, grid[1])
        for part in (0.02, 0.5, 0.98):
            x, y = (col + part) * width / grid[1], (row + part) * height / grid[0]
            assert patch_at(x, y, size, grid) == patch
    assert patch_at(-3, -3, size, grid) == 0
    assert patch_at(width, height, size, grid) == grid[0] * grid[1] - 1


def test_the_brightest_patch_is_the_most_attended_and_the_asked_one_is_framed() -> None:
    rows = torch.full((12, 12), 0.01)
    rows[5, 10] = 0.9  # row 1, column 1 looks at row 2, column 2 of 3 x 4
    drawn = np.asarray(PatchAttention(Image.new("RGB", (80, 60)), (3, 4), rows).drawn(5), float)
    means = drawn.reshape(3, 20, 4, 20, 3)[:, 5:15, :, 5:15].mean(axis=(1, 3, 4))
    assert np.unravel_index(means.argmax(), means.shape) == (2, 2)
    assert (drawn[19, 19:41] == 255).all() and (drawn[40, 19:41] == 255).all()  # white frame around 20..40


def test_towers_without_it_are_named() -> None:
    model, processor = build("qwen2_5_vl")
    vlm = vzip.CompressedVlm(model, vzip.Identity(), processor)
    with pytest.raises(UnsupportedModelError, match="CLIP or SigLIP kind"):
        patch_attention(vlm, Image.new("RGB", (56, 56)))
    model = tiny.llava()
    model.config.vision_feature_layer = 0
    with pytest.raises(ConfigError, match=r"vision_feature_layer=0.* 1 to "):
        patch_attention(vzip.CompressedVlm(model, vzip.Identity(), tiny.processor()), Image.new("RGB", (56, 56)))
