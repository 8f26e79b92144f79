"""LLaVA-NeXT's crops: the published preprocessing to rounding, ties included, and the grids both rules choose."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tests.media.images import picture
from transformers import LlavaNextImageProcessor

from vzip.errors import ConfigError, ImageError
from vzip.models.families.llava_next.anyres import hf_grid, llava_grid, placement, prepare_crops

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZE = {"height": 336, "width": 336}
PROCESSOR = LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS)


def crops_of(*pictures: Image.Image, rule: str = "llava") -> dict[str, torch.Tensor]:
    return prepare_crops(pictures, PROCESSOR, rule, PINPOINTS, 336)


def test_llava_preprocessing_equals_llavas_own(golden, names_pillow):
    with safe_open(golden / "image_preprocessing.safetensors", "pt") as numbers:
        sizes = json.loads(numbers.metadata()["sizes_wh"])
        assert json.loads(numbers.metadata()["pinpoints"]) == PINPOINTS
        expected = [numbers.get_tensor(f"anyres_{i}") for i in range(len(sizes))]
        means = [numbers.get_tensor(f"anyres_mean_{i}") for i in range(len(sizes))]
        grids = [numbers.get_tensor(f"grid_wh_{i}").tolist() for i in range(len(sizes))]
    ours = crops_of(*(picture(width, height) for width, height in sizes))
    assert ours["pixel_values"].shape == (5, 5, 3, 336, 336) and ours["pixel_values"].dtype == torch.float32
    assert ours["image_sizes"].tolist() == [[height, width] for width, height in sizes]
    assert ours["tile_grids"].tolist() == [[rows, cols] for cols, rows in grids]
    for own, crops, mean in zip(ours["pixel_values"], expected, means, strict=True):
        torch.testing.assert_close(own[: len(crops), :, ::6, ::6], crops, rtol=0, atol=2e-6, msg=names_pillow)
        torch.testing.assert_close(own[: len(crops)].double().mean(dim=(2, 3)), mean.double(), rtol=0, atol=1e-5)
        assert not own[len(crops) :].any()  # zero padding to the most crops


def test_hf_is_the_processor_itself_and_its_ties_are_transposed():
    small = picture(200, 150)
    stock = PROCESSOR(images=[small], return_tensors="pt")
    ours = crops_of(small, rule="hf")
    assert set(ours) == {"pixel_values", "image_sizes"}
    assert torch.equal(ours["pixel_values"], stock["pixel_values"])
    assert (hf_grid(150, 200, PINPOINTS, 336), llava_grid(150, 200, PINPOINTS, 336)) == ((1, 2), (2, 1))
    assert crops_of(small)["tile_grids"].tolist() == [[2, 1]]
    wide = picture(640, 480)  # no tie: the same grid, and tiles that agree up to the two libraries' rounding
    tiles = [crops_of(wide, rule=rule)["pixel_values"][:, 1:] for rule in ("llava", "hf")]
    torch.testing.assert_close(*tiles, rtol=0, atol=0.02)


def test_both_grids_equal_a_search_written_out():
    """Every size on a coarse grid, against the rule in words: most shown, then least wasted, then first."""
    for height in range(20, 1500, 97):
        for width in range(20, 1500, 83):
            ranked = []
            for order, (first, second) in enumerate(PINPOINTS):
                for name, (tall, broad) in (("hf", (first, second)), ("llava", (second, first))):
                    scale = min(broad / width, tall / height)
                    shown = min(int(width * scale) * int(height * scale), width * height)
                    ranked.append((name, -shown, tall * broad - shown, order, (tall // 336, broad // 336)))
            for name, rule in (("hf", hf_grid), ("llava", llava_grid)):
                best = min(row[1:] for row in ranked if row[0] == name)
                assert rule(height, width, PINPOINTS, 336) == best[-1]


@pytest.mark.parametrize("size", [(20000, 3), (3, 20000), (1, 1)])
@pytest.mark.parametrize("rule", ["llava", "hf"])
def test_extreme_shapes_work(size, rule):
    ours = crops_of(picture(*size), rule=rule)
    assert ours["pixel_values"].shape[2:] == (3, 336, 336) and torch.isfinite(ours["pixel_values"]).all()
    assert ours["pixel_values"][0, 0].std() >= 0 and ours["image_sizes"].tolist() == [[size[1], size[0]]]


def test_placement_holds_the_image_inside_the_canvas():
    assert placement(480, 640, 672, 672) == (84, 0, 504, 672)
    assert placement(640, 480, 672, 672) == (0, 84, 672, 504)
    assert placement(3, 20000, 336, 1008) == (167, 0, 1, 1008)
    crops = crops_of(Image.new("RGB", (640, 480), "white"))["pixel_values"][0]
    black, white = [(value - np.float32(PROCESSOR.image_mean[0])) / PROCESSOR.image_std[0] for value in (0, 1)]
    top = crops[1, 0]  # the first tile: 84 rows of padding, then the image
    assert torch.allclose(top[:84], torch.tensor(black)) and torch.allclose(top[84:], torch.tensor(white))


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"model\.preprocess='pad'"):
        crops_of(picture(9, 9), rule="pad")
    with pytest.raises(ImageError, match="no pixels"):
        crops_of(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("rule", ["llava", "hf"])
@pytest.mark.parametrize(("rescales", "normalises"), [(True, False), (False, True), (False, False)])
def test_a_step_that_the_image_processor_leaves_out_is_left_out(rule, rescales, normalises):
    settings = {"do_rescale": rescales, "do_normalize": normalises, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    if not normalises:
        settings |= {"image_mean": None, "image_std": None}
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 336}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS, **settings
    )
    for name, value in settings.items():  # a null of the file's stays one
        setattr(image_processor, name, value)
    own = prepare_crops([Image.new("RGB", (672, 672), (51, 102, 255))], image_processor, rule, PINPOINTS, 336)
    colour = torch.tensor([51.0, 102.0, 255.0]) / (255 if rescales else 1)
    expected = (colour - 0.5) / 0.25 if normalises else colour
    assert own["pixel_values"].shape == (1, 5, 3, 336, 336)
    torch.testing.assert_close(own["pixel_values"].float().amax(dim=(0, 1, 3, 4)), expected)
    torch.testing.assert_close(own["pixel_values"].float().amin(dim=(0, 1, 3, 4)), expected)


@pytest.mark.parametrize("rule", ["llava", "hf"])
def test_settings_of_the_image_processor_that_contradict_each_other(rule):
    image_processor = LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size=SIZE)
    image_processor.image_mean = image_processor.rescale_factor = None
    with pytest.raises(ConfigError, match=r"do_rescale=true needs rescale_factor.*do_normalize=true needs image_mean"):
        prepare_crops([picture(9, 9)], image_processor, rule, PINPOINTS, 336)
