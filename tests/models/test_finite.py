"""NaN and infinity in weights, pixels and logits are an error that names where; no token 0 for ever."""

from __future__ import annotations

import math

import pytest
import torch
from tests import tiny
from tests.tiny import IMAGE_TOKEN

import vzip
from vzip.models.families.finite import NotFiniteError, check_logits, damaged_weights

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


@pytest.fixture
def vlm():
    return vzip.CompressedVlm(tiny.llava(vocab_size=320).eval(), vzip.VisionZip(BUDGET), tiny.processor())


def inputs(vlm, num_images=2):
    pixels = torch.rand(num_images, 3, vlm.adapter.geometry.image_size, vlm.adapter.geometry.image_size)
    return {"input_ids": torch.tensor([[1, IMAGE_TOKEN, 5, 7]] * num_images), "pixel_values": pixels}


def calls(vlm, given):
    text = {"input_ids": given["input_ids"]}
    yield lambda: vlm.encode_images(given["pixel_values"])
    yield lambda: vlm.prepare(**text, pixel_values=given["pixel_values"])
    yield lambda: vlm(**text, pixel_values=given["pixel_values"])
    yield lambda: vlm.generate(**text, pixel_values=given["pixel_values"], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixels(vlm, value):
    given = inputs(vlm)
    for call in calls(vlm, given):
        call()
    given["pixel_values"][1, 0, 3, 4] = value
    for call in calls(vlm, given):
        with pytest.raises(NotFiniteError, match="pixel_values: number 1 of 2 holds NaN or infinity"):
            call()


@pytest.mark.parametrize("part", ["vision_tower", "projector", "language_model"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights(vlm, part, value):
    name, weight = next(
        (name, p)
        for name, p in getattr(vlm.adapter, part).named_parameters()
        if name.endswith("weight") and p.ndim == 2
    )
    with torch.no_grad():
        weight[:] = value
    (damaged,) = damaged_weights(vlm.model)
    assert damaged.endswith(name)
    for call in list(calls(vlm, inputs(vlm)))[2:]:
        with pytest.raises(NotFiniteError, match=damaged.replace(".", r"\.")):
            call()


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_the_last_layer_and_every_way_to_choose(vlm, settings):
    with torch.no_grad():
        vlm.model.get_output_embeddings().weight[3] = math.nan
    given = inputs(vlm)
    with pytest.raises(NotFiniteError, match=r"the logits of the next token .*lm_head"):
        vlm.generate(**given, max_new_tokens=2, **settings)


def test_a_precision_that_does_not_suffice_is_named():
    finite = tiny.llava(vocab_size=320)
    with pytest.raises(NotFiniteError, match=r"model\.dtype=bfloat16"):
        check_logits(finite, torch.tensor([[0.0, math.inf]]))
    check_logits(finite, torch.tensor([[0.0, -math.inf]]))  # a forbidden word
    with pytest.raises(NotFiniteError):
        check_logits(finite, torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]]))


def test_a_dialogue(vlm):
    with torch.no_grad():
        vlm.adapter.projector.linear_1.weight[:] = math.nan
    from PIL import Image

    with pytest.raises(NotFiniteError, match="linear_1"):
        vlm.chat().add_image(Image.new("RGB", (20, 20)))
