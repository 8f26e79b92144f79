"""Where a model is put: one device, a map of devices, two wrappers on one model, inputs left on the CPU."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILIES
from tests.gpu.kit import BUDGET, each_device, prompt
from tests.tiny import Family

import vzip

COMPRESSORS = [vzip.VisionZip(BUDGET), vzip.Identity()]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
each_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=["visionzip", "none"])


@each_device
@each_family
@each_compressor
@pytest.mark.usefixtures("no_tf32")
@torch.no_grad()
def test_a_device_map_gives_the_numbers_of_the_cpu(
    family: Family, compressor: vzip.Compressor, device: str, tmp_path
) -> None:
    """Inputs stay on the CPU. Several GPUs: the language model's layers on the second one as well."""
    model, inputs, ids = family.build(), family.inputs(2), prompt(family, [1, 1])
    model.save_pretrained(tmp_path)
    expected = vzip.CompressedVlm(model, compressor).forward(ids, **inputs).logits
    maps = [{"": device}]
    if device == "cuda":
        maps.append("auto")  # type: ignore[arg-type]
    if device == "cuda" and torch.cuda.device_count() > 1:
        names = [name for name, _ in vzip.CompressedVlm(model, compressor).adapter.language_model.named_modules()]
        layers = [name for name in names if name.count(".") == 1]
        spread = {"model": 0, "lm_head": 1, **{f"model.language_model.{name}": 1 for name in layers[1:]}}
        maps.append(spread)  # type: ignore[arg-type]
    for device_map in maps:
        vlm = vzip.load_vlm(tmp_path, device_map=device_map, dtype="float32", compressor=compressor)
        assert {parameter.device.type for parameter in vlm.model.parameters()} == {device}
        logits = vlm.forward(ids, **inputs).logits
        assert logits.device.type == device
        torch.testing.assert_close(logits.cpu(), expected, atol=2e-3, rtol=2e-3)
        new = vlm.generate(ids, **inputs, max_new_tokens=3)
        assert new.device.type == device and new.shape == (1, 3)


@each_device
@each_family
@torch.no_grad()
def test_two_wrappers_share_a_model(family: Family, device: str) -> None:
    """In turn and with inputs on either side, each gives what it gives alone."""
    model = family.build().to(device)
    wrappers = [vzip.CompressedVlm(model, compressor) for compressor in COMPRESSORS]
    inputs, ids = family.inputs(2), prompt(family, [1, 1])
    there = {name: tensor.to(device) for name, tensor in inputs.items()}
    alone = [vzip.CompressedVlm(model, compressor).forward(ids, **inputs).logits for compressor in COMPRESSORS]
    assert alone[0].shape != alone[1].shape
    for _ in range(2):
        for vlm, expected in zip(wrappers, alone, strict=True):
            assert torch.equal(vlm.forward(ids, **inputs).logits, expected)
            assert torch.equal(vlm.forward(ids.to(device), **there).logits, expected)
            assert vlm.model is model and vlm.device.type == device


@each_device
@torch.no_grad()
def test_labels_and_masks_go_where_the_language_model_is(device: str) -> None:
    family = FAMILIES[0]
    vlm = vzip.CompressedVlm(family.build().to(device), COMPRESSORS[0])
    ids = prompt(family, [1, 1]).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    prepared = vlm.prepare(ids, mask, **family.inputs(4), labels=ids)
    for tensor in (prepared.inputs_embeds, prepared.attention_mask, prepared.position_ids, prepared.labels):
        assert tensor is not None and tensor.device.type == device
    output = vlm.forward(ids, mask, **family.inputs(4), labels=ids)
    assert output.loss.device.type == device and torch.isfinite(output.loss)
