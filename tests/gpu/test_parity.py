"""Without compression, in half precision: bit for bit what Hugging Face's own model computes on the same device."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILIES
from tests.gpu.kit import BUDGET, each_device, each_half, on, prompt
from tests.tiny import Family

import vzip

KINDS = [(family, tower, strategy) for family in FAMILIES for tower, strategy in family.kinds]


@each_device
@each_half
@pytest.mark.parametrize(("family", "tower", "strategy"), KINDS, ids=str)
@torch.no_grad()
def test_identity_equals_stock_bit_for_bit(
    family: Family, tower: str, strategy: str, dtype: torch.dtype, device: str
) -> None:
    model = family.build(tower, strategy).to(device, dtype)
    inputs = on(device, family.inputs(2), dtype)
    lengths = family.stock_lengths(model, inputs)
    ids, short = prompt(family, lengths).to(device), prompt(family, [1, 1]).to(device)
    mask = torch.ones_like(ids)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    stock = model(input_ids=ids, attention_mask=mask, **family.stock(inputs)).logits
    assert stock.dtype == dtype and stock.device.type == device and torch.isfinite(stock).all()
    assert torch.equal(vlm.forward(ids, mask, **inputs).logits, stock)
    assert torch.equal(vlm.forward(short, **inputs).logits, stock)
    assert vlm.last_num_visual_tokens == lengths
    settings = {"max_new_tokens": 8, "do_sample": False}
    stock_tokens = model.generate(input_ids=ids, attention_mask=mask, **family.stock(inputs), **settings)
    assert torch.equal(vlm.generate(short, **inputs, **settings), stock_tokens[:, ids.shape[1] :])


@each_device
@each_half
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_what_is_spliced_is_what_was_encoded(family: Family, dtype: torch.dtype, device: str) -> None:
    """Compressed: the visual tokens stand in their places bit for bit, and the forward is the model's own on them."""
    model = family.build().to(device, dtype)
    inputs = on(device, family.inputs(2), dtype)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    ids = prompt(family, [1, 1]).to(device)
    encoded = family.encode(vlm, inputs)
    prepared = vlm.prepare(ids, **inputs)
    text = vlm.adapter.embed_tokens(torch.tensor([5, 6, 7, 8], device=device))
    expected = torch.cat([text[:2], encoded[0], text[2:3], encoded[1], text[3:]])
    assert torch.equal(prepared.inputs_embeds[0], expected)
    assert [len(tokens) for tokens in encoded] == [9 * count + family.num_added for count in family.num_crops(2)]
    logits = model(inputs_embeds=expected[None], attention_mask=torch.ones_like(prepared.attention_mask)).logits
    assert torch.equal(vlm.forward(ids, **inputs).logits, logits)


@each_device
@torch.no_grad()
def test_the_built_in_model_in_half_precision(device: str) -> None:
    """576 visual tokens of a trained model: as stock; and with 64 it runs, and sees 64."""
    vlm = vzip.load_vlm("vzip/tiny", dtype="bfloat16", device_map={"": device})
    generator = torch.Generator().manual_seed(0)
    inputs = on(device, {"pixel_values": torch.randn(1, 3, 336, 336, generator=generator)}, torch.bfloat16)
    token = vlm.adapter.image_token_id
    ids = torch.tensor([[5, 6, *[token] * 576, 7]], device=device)
    assert torch.equal(vlm.forward(ids, **inputs).logits, vlm.model(input_ids=ids, **inputs).logits)
    vlm.compressor = vzip.VisionZip(vzip.TokenBudget(num_dominant=54, num_contextual=10))
    logits = vlm.forward(ids, **inputs).logits
    assert vlm.last_num_visual_tokens == [64] and logits.shape[1] == 67 and torch.isfinite(logits).all()
