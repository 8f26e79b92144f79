"""Pruning where masks, positions and the cache are on a device, and static caches are compiled by themselves."""

from __future__ import annotations

import pytest
import torch
from tests import tiny
from tests.gpu.kit import BUDGET, each_device, each_half, on
from tests.pruners.methods import PRUNERS

import vzip

IDS = torch.tensor([[5, tiny.IMAGE_TOKEN, 6, 7, 8], [3, 3, 9, tiny.IMAGE_TOKEN, 10]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def wrapper(device: str, pruner: vzip.Pruner | None) -> vzip.CompressedVlm:
    model = tiny.llava(num_text_layers=4).to(device)
    return vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), pruner=pruner)


@each_device
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_equals_its_singles_and_the_cpu(device, cache, no_tf32):
    vlm = wrapper(device, vzip.FastV(2, 4))
    inputs = on(device, {"input_ids": IDS, "attention_mask": MASK, "pixel_values": tiny.pixels(2)})
    settings = {"max_new_tokens": 6, "cache_implementation": cache}
    new = vlm.generate(**inputs, **settings)
    assert [layers[-1] for layers in vlm.last_pruned.visual_schedule] == [4, 4]
    for row in range(2):
        alone = vlm.generate(**{name: value[row : row + 1] for name, value in inputs.items()}, **settings)
        assert torch.equal(alone[0], new[row])
    there = wrapper("cpu", vzip.FastV(2, 4)).generate(**on("cpu", inputs), max_new_tokens=6)
    assert torch.equal(there, new.cpu())


@each_device
@each_half
def test_keeping_everything_is_the_unpruned_model(device, dtype):
    vlm = wrapper(device, None)
    vlm.model.to(dtype)
    inputs = on(device, {"input_ids": IDS, "attention_mask": MASK, "pixel_values": tiny.pixels(2)})
    with torch.no_grad():
        expected = vlm.forward(**inputs).logits
        vlm.pruner = vzip.FastV(2, 9)
        assert torch.equal(vlm.forward(**inputs).logits, expected)


@each_device
@pytest.mark.parametrize("pruner", PRUNERS, ids=str)
def test_every_pruner_gives_what_it_gives_on_the_cpu(device, pruner, no_tf32):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": tiny.pixels(2)}
    logits = []
    for where in (device, "cpu"):
        vlm = wrapper(where, pruner)
        with torch.no_grad():
            logits.append(vlm.forward(**on(where, inputs)).logits.cpu())
        assert vlm.last_pruned.visual_schedule[0][-1] < 9
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
