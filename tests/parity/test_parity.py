"""The wrapper against stock Hugging Face (bit for bit without compression) and the published code (with it)."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.tiny import IMAGE_TOKEN, NUM_PATCHES
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import vzip

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
KINDS = [("clip", "default"), ("clip", "full"), ("siglip", "default"), ("siglip", "full")]


def expanded(tower: str, strategy: str) -> int:
    return NUM_PATCHES + (tower == "clip") - (strategy == "default")


def prompt(num_images_at: list[str | int], length: int) -> torch.Tensor:
    """[1, T]: integers are text ids, "image" an expanded run of ``length`` placeholders."""
    return torch.tensor(
        [[i for item in num_images_at for i in ([IMAGE_TOKEN] * length if item == "image" else [item])]]
    )


@pytest.mark.parametrize(("tower", "strategy"), KINDS)
@pytest.mark.parametrize("select_layer", [-2, -1, 1, 3, -4])
def test_identity_equals_stock_bit_for_bit(tower, strategy, select_layer):
    model = tiny.llava(tower, strategy, select_layer)
    length = expanded(tower, strategy)
    ids = prompt([5, 6, "image", 7, "image", 8, 9], length)
    mask, pixel_values = torch.ones_like(ids), tiny.pixels(2)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=mask, pixel_values=pixel_values)
        ours = vlm.forward(ids, mask, pixel_values=pixel_values)
        short = prompt([5, 6, "image", 7, "image", 8, 9], 1)
        from_short = vlm.forward(short, pixel_values=pixel_values)
    assert torch.equal(ours.logits, stock.logits) and torch.equal(from_short.logits, stock.logits)
    assert vlm.last_num_visual_tokens == [length, length]
    if select_layer != -2:
        return
    settings = {"max_new_tokens": 12, "do_sample": False}
    stock_tokens = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixel_values, **settings)
    our_tokens = vlm.generate(ids, mask, pixel_values=pixel_values, **settings)
    assert torch.equal(our_tokens, stock_tokens[:, ids.shape[1] :])
    assert len(set(our_tokens[0].tolist())) > 1  # the tiny model does not just repeat itself


@pytest.mark.parametrize("side", ["left", "right"])
def test_identity_equals_stock_on_padded_batches(side):
    model = tiny.llava()
    long = prompt([5, "image", 7, "image", 9], NUM_PATCHES)
    short = prompt([6, "image", 8], NUM_PATCHES)
    filler = torch.full((1, long.shape[1] - short.shape[1]), 3)
    row = torch.cat([filler, short] if side == "left" else [short, filler], dim=1)
    ids = torch.cat([long, row])
    mask = (ids != 3).long()
    pixel_values = tiny.pixels(3)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    with torch.no_grad():
        prepared = vlm.prepare(ids, mask, pixel_values=pixel_values)
        assert torch.equal(prepared.attention_mask, mask)
        stock = model(
            input_ids=ids, attention_mask=mask, pixel_values=pixel_values, position_ids=prepared.position_ids
        ).logits
        ours = vlm.forward(ids, mask, pixel_values=pixel_values).logits
    assert torch.equal(ours[mask.bool()], stock[mask.bool()])


def test_identity_gives_the_stock_loss_and_gradients():
    model = tiny.llava()
    ids = prompt([5, "image", 7, 8, 9], NUM_PATCHES)
    labels = torch.where(ids == IMAGE_TOKEN, -100, ids)
    pixel_values = tiny.pixels(1)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    weight = vlm.adapter.projector.linear_1.weight
    stock = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixel_values, labels=labels).loss
    (stock_gradient,) = torch.autograd.grad(stock, weight)
    ours = vlm.forward(ids, pixel_values=pixel_values, labels=labels).loss
    (our_gradient,) = torch.autograd.grad(ours, weight)
    assert torch.equal(ours, stock) and stock > 0
    torch.testing.assert_close(our_gradient, stock_gradient)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """The published code's tiny LLaVA, loaded through load_vlm, and its case."""
    folder = golden / "llava15_tiny"
    case = json.loads((folder / "case.json").read_text())
    image_token = case["text"]["vocab_size"] - 1
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**case["vision"]),
        text_config=LlamaConfig(**case["text"]),
        image_token_id=image_token,
        vision_feature_layer=case["vision_feature_layer"],
    )
    directory = tmp_path_factory.mktemp("llava15_tiny")
    config.save_pretrained(directory)
    shutil.copyfile(folder / "weights.safetensors", directory / "model.safetensors")
    budget = vzip.TokenBudget(case["dominant"], case["contextual"])
    vlm = vzip.load_vlm(directory, compressor=vzip.VisionZip(budget))
    drawn = np.random.RandomState(case["pixel_seed"]).randn(2, 3, 336, 336).astype(np.float32)
    assert np.allclose(drawn.astype(np.float64).sum(axis=(1, 2, 3)), case["pixel_sums"])
    ids = torch.tensor([[image_token if i == "<image>" else i for i in case["prompt_ids"]]])
    return vlm, ids, torch.from_numpy(drawn), load_file(folder / "expected_54+10.safetensors")


@torch.no_grad()
def test_visionzip_equals_the_published_code_end_to_end(published):
    vlm, ids, pixel_values, expected = published
    batch_ids = ids.expand(2, -1)
    together = vlm.prepare(batch_ids, pixel_values=pixel_values)
    logits = vlm.forward(batch_ids, pixel_values=pixel_values).logits
    assert vlm.last_num_visual_tokens == [64, 64]
    for i in range(2):
        one = pixel_values[i : i + 1]
        alone = vlm.prepare(ids, pixel_values=one)
        wanted = expected[f"inputs_embeds_{i}"]
        torch.testing.assert_close(alone.inputs_embeds, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(together.inputs_embeds[i : i + 1], wanted, rtol=0, atol=1e-4)
        wanted = expected[f"logits_{i}"]
        torch.testing.assert_close(vlm.forward(ids, pixel_values=one).logits, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits[i : i + 1], wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_uncompressed_equals_the_published_code(published):
    vlm, ids, pixel_values, expected = published
    plain = vzip.CompressedVlm(vlm.model, vzip.Identity())
    for i in range(2):
        embeds = plain.prepare(ids, pixel_values=pixel_values[i : i + 1]).inputs_embeds
        torch.testing.assert_close(embeds[:, :8], expected[f"full_inputs_embeds_{i}"].view(1, 8, -1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_cached_generation_equals_starting_over_at_every_step():
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET))
    ids, pixel_values = prompt([5, 6, "image", 7], 1), tiny.pixels(1)
    cached = vlm.generate(ids, pixel_values=pixel_values, max_new_tokens=10, do_sample=False)
    grown = ids
    for _ in range(10):
        logits = vlm.forward(grown, pixel_values=pixel_values, use_cache=False).logits
        grown = torch.cat([grown, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(cached, grown[:, ids.shape[1] :])
    assert len(set(cached[0].tolist())) > 2


MIXED = [([5, 6, 7], 0), (["image", 8, 9, 10, 11], 1), ([5, "image", "image", 6, "image", 7], 3), ([9, "image"], 1)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["placeholder", "expanded"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_a_mixed_batch_equals_one_by_one(side, form, tower):
    model = tiny.llava(tower, "full")
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    length = 1 if form == "placeholder" else expanded(tower, "full")
    prompts = [prompt(items, length) for items, _ in MIXED]
    longest = max(p.shape[1] for p in prompts)
    padded, masks = [], []
    for p in prompts:
        filler = torch.full((1, longest - p.shape[1]), 3)
        ones, zeros = torch.ones_like(p), torch.zeros_like(filler)
        padded.append(torch.cat([filler, p] if side == "left" else [p, filler], dim=1))
        masks.append(torch.cat([zeros, ones] if side == "left" else [ones, zeros], dim=1))
    ids, mask, pixel_values = torch.cat(padded), torch.cat(masks), tiny.pixels(5)
    together = vlm.forward(ids, mask, pixel_values=pixel_values)
    prepared = vlm.prepare(ids, mask, pixel_values=pixel_values)
    generated = vlm.generate(ids, mask, pixel_values=pixel_values, max_new_tokens=6, do_sample=False)
    assert vlm.last_num_visual_tokens == [9] * 5
    used = 0
    for row, (p, (_, num_images)) in enumerate(zip(prompts, MIXED, strict=True)):
        own = pixel_values[used : used + num_images] if num_images else None
        used += num_images
        alone = vlm.forward(p, pixel_values=own).logits[0]
        of_row = together.logits[row][prepared.attention_mask[row].bool()]
        torch.testing.assert_close(of_row, alone, rtol=0, atol=2e-4)
        assert prepared.attention_mask[row, 0 if side == "right" else -1] == 1
        tokens = vlm.generate(p, pixel_values=own, max_new_tokens=6, do_sample=False)
        assert torch.equal(generated[row], tokens[0])


@torch.no_grad()
def test_gradients_agree_with_finite_differences():
    """In float64: pixels -> tower -> kept and merged tokens -> projector -> inputs_embeds.

    Up to there and no further: Hugging Face's Llama computes its norms and loss in float32 whatever the model's type.
    """
    model = tiny.llava().double()
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    ids = prompt([5, "image", 7, 8], 1)
    pixel_values = tiny.pixels(1).double().requires_grad_()
    weight = vlm.adapter.projector.linear_1.weight

    mixture = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss():
        return (vlm.prepare(ids, pixel_values=pixel_values).inputs_embeds * mixture).sum()

    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), (pixel_values, weight))
    generator = torch.Generator().manual_seed(1)
    for leaf, gradient in zip((pixel_values, weight), gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        leaf.add_(direction, alpha=step)
        above = loss()
        leaf.sub_(direction, alpha=2 * step)
        below = loss()
        leaf.add_(direction, alpha=step)
        numeric = (above - below) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-9)
        assert numeric.abs() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs(dtype):
    vlm = vzip.CompressedVlm(tiny.llava().to(dtype), vzip.VisionZip(BUDGET))
    ids = prompt([5, "image", 7], 1)
    output = vlm.forward(ids, pixel_values=tiny.pixels(1))
    assert output.logits.dtype == dtype and torch.isfinite(output.logits).all()
    assert vlm.encode_images(tiny.pixels(2))[1].dtype == dtype
    assert vlm.generate(ids, pixel_values=tiny.pixels(1), max_new_tokens=3).shape == (1, 3)
