"""The wrapper against stock Hugging Face (bit for bit without compression) and the published code (with it)."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.families import FAMILIES
from tests.isolation.snapshot import changed, snapshot
from tests.tiny import Family, some_of
from transformers import CLIPVisionConfig, LlamaConfig

import vzip

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
KINDS = [(family, tower, strategy) for family in FAMILIES for tower, strategy in family.kinds]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def prompt(family: Family, items: list[int | str], lengths: list[int] | None = None) -> torch.Tensor:
    """[1, T]: integers are text ids, "image" a run of the next of ``lengths`` placeholders (None: always one)."""
    runs = iter(lengths or [1] * len(items))
    return torch.tensor([[i for item in items for i in ([family.token] * next(runs) if item == "image" else [item])]])


@pytest.mark.parametrize(("family", "tower", "strategy"), KINDS, ids=str)
@pytest.mark.parametrize("select_layer", [-2, -1, 1, 3, -4])
def test_identity_equals_stock_bit_for_bit(family, tower, strategy, select_layer):
    model = family.build(tower, strategy, select_layer)
    inputs = family.inputs(2)
    lengths = family.stock_lengths(model, inputs)
    items = [5, 6, "image", 7, "image", 8, 9]
    ids = prompt(family, items, lengths)
    mask = torch.ones_like(ids)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=mask, **family.stock(inputs))
        ours = vlm.forward(ids, mask, **inputs)
        from_short = vlm.forward(prompt(family, items), **inputs)
    assert torch.equal(ours.logits, stock.logits) and torch.equal(from_short.logits, stock.logits)
    assert vlm.last_num_visual_tokens == lengths
    if select_layer != -2:
        return
    settings = {"max_new_tokens": 12, "do_sample": False}
    stock_tokens = model.generate(input_ids=ids, attention_mask=mask, **family.stock(inputs), **settings)
    our_tokens = vlm.generate(ids, mask, **inputs, **settings)
    assert torch.equal(our_tokens, stock_tokens[:, ids.shape[1] :])
    assert len(set(our_tokens[0].tolist())) > 1  # the tiny model does not just repeat itself


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_identity_equals_stock_on_padded_batches(family, side):
    model = family.build()
    inputs = family.inputs(3)
    lengths = family.stock_lengths(model, inputs)
    long = prompt(family, [5, "image", 7, "image", 9], lengths[:2])
    short = prompt(family, [6, "image", 8], lengths[2:])
    filler = torch.full((1, long.shape[1] - short.shape[1]), 3)
    row = torch.cat([filler, short] if side == "left" else [short, filler], dim=1)
    ids = torch.cat([long, row])
    mask = (ids != 3).long()
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    with torch.no_grad():
        prepared = vlm.prepare(ids, mask, **inputs)
        assert torch.equal(prepared.attention_mask, mask)
        stock = model(
            input_ids=ids, attention_mask=mask, position_ids=prepared.position_ids, **family.stock(inputs)
        ).logits
        ours = vlm.forward(ids, mask, **inputs).logits
    assert torch.equal(ours[mask.bool()], stock[mask.bool()])


@each_family
def test_identity_gives_the_stock_loss_and_gradients(family):
    model = family.build()
    inputs = family.inputs(1)
    ids = prompt(family, [5, "image", 7, 8, 9], family.stock_lengths(model, inputs))
    labels = torch.where(ids == family.token, -100, ids)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    weight = vlm.adapter.projector.linear_1.weight
    stock = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **family.stock(inputs)).loss
    (stock_gradient,) = torch.autograd.grad(stock, weight)
    ours = vlm.forward(ids, labels=labels, **inputs).loss
    (our_gradient,) = torch.autograd.grad(ours, weight)
    assert torch.equal(ours, stock) and stock > 0
    torch.testing.assert_close(our_gradient, stock_gradient)


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family.published], ids=str)
def published(request, golden, tmp_path_factory):
    """The published code's tiny model through load_vlm, its prompt, its images one by one, and its numbers."""
    family = request.param
    folder = golden / family.name
    case = json.loads((folder / "case.json").read_text())
    expected = load_file(folder / "expected_54+10.safetensors")
    image_token = case["text"]["vocab_size"] - 1
    config = family.config_class(
        vision_config=CLIPVisionConfig(**case["vision"]),
        text_config=LlamaConfig(**case["text"]),
        image_token_index=image_token,
        vision_feature_layer=case["vision_feature_layer"],
    )
    if "image_grid_pinpoints" in case:
        config.image_grid_pinpoints = case["image_grid_pinpoints"]
    directory = tmp_path_factory.mktemp(family.name)
    config.save_pretrained(directory)
    shutil.copyfile(folder / "weights.safetensors", directory / "model.safetensors")
    vlm = vzip.load_vlm(directory, compressor=vzip.VisionZip(vzip.TokenBudget(case["dominant"], case["contextual"])))
    random = np.random.RandomState(case["pixel_seed"])
    drawn = [random.randn(*shape).astype(np.float32) for shape in case.get("pixel_shapes", [(3, 336, 336)] * 2)]
    assert np.allclose([one.astype(np.float64).sum() for one in drawn], case["pixel_sums"])
    pictures = [{"pixel_values": torch.from_numpy(one)[None]} for one in drawn]
    for number, picture in enumerate(pictures):
        if f"image_size_{number}" in expected:
            picture["image_sizes"] = expected[f"image_size_{number}"][None]
    ids = torch.tensor([[image_token if i == "<image>" else i for i in case["prompt_ids"]]])
    return vlm, ids, pictures, expected


def joined(pictures):
    """One batch of images of different numbers of crops."""
    most = max(picture["pixel_values"].shape[1] for picture in pictures)
    together = {key: [picture[key] for picture in pictures] for key in pictures[0]}
    if together["pixel_values"][0].ndim == 5:
        together["pixel_values"] = [
            torch.nn.functional.pad(values, [0] * 7 + [most - values.shape[1]]) for values in together["pixel_values"]
        ]
    return {key: torch.cat(values) for key, values in together.items()}


@torch.no_grad()
def test_visionzip_equals_the_published_code_end_to_end(published):
    vlm, ids, pictures, expected = published
    both = joined(pictures)
    together = vlm.prepare(ids.expand(2, -1), padding_side="right", **both)
    counts = [expected[f"inputs_embeds_{i}"].shape[1] - 6 for i in range(2)]
    assert vlm.last_num_visual_tokens == counts
    assert counts in ([64, 64], [320, 256])  # NeXT: five crops and four
    for i, one in enumerate(pictures):
        alone = vlm.prepare(ids, **one)
        wanted = expected[f"inputs_embeds_{i}"]
        torch.testing.assert_close(alone.inputs_embeds, wanted, rtol=0, atol=1e-4)
        of_batch = together.inputs_embeds[i : i + 1, : wanted.shape[1]]
        torch.testing.assert_close(of_batch, wanted, rtol=0, atol=1e-4)
        wanted = expected[f"logits_{i}"]
        torch.testing.assert_close(vlm.forward(ids, **one).logits, wanted, rtol=0, atol=1e-4)
    mask = together.attention_mask
    logits = vlm.model(inputs_embeds=together.inputs_embeds, attention_mask=mask, position_ids=together.position_ids)
    for i in range(2):
        own = logits.logits[i][mask[i].bool()]
        torch.testing.assert_close(own, expected[f"logits_{i}"][0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_uncompressed_equals_the_published_code(published):
    vlm, ids, pictures, expected = published
    plain = vzip.CompressedVlm(vlm.model, vzip.Identity())
    for i, one in enumerate(pictures):
        embeds = plain.prepare(ids, **one).inputs_embeds
        torch.testing.assert_close(embeds[:, :8], expected[f"full_inputs_embeds_{i}"].view(1, 8, -1), rtol=0, atol=1e-4)


@each_family
@torch.no_grad()
def test_cached_generation_equals_starting_over_at_every_step(family):
    vlm = vzip.CompressedVlm(family.build(), vzip.VisionZip(BUDGET))
    ids, inputs = prompt(family, [5, 6, "image", 7]), family.inputs(1)
    cached = vlm.generate(ids, max_new_tokens=10, do_sample=False, **inputs)
    grown = ids
    for _ in range(10):
        logits = vlm.forward(grown, use_cache=False, **inputs).logits
        grown = torch.cat([grown, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(cached, grown[:, ids.shape[1] :])
    assert len(set(cached[0].tolist())) > 2


MIXED = [([5, 6, 7], 0), (["image", 8, 9, 10, 11], 1), ([5, "image", "image", 6, "image", 7], 3), ([9, "image"], 1)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["placeholder", "expanded"])
@pytest.mark.parametrize(("family", "tower"), sorted({(f, t) for f in FAMILIES for t, _ in f.kinds}, key=str), ids=str)
@torch.no_grad()
def test_a_mixed_batch_equals_one_by_one(side, form, family, tower):
    model = family.build(tower, next(strategy for kind, strategy in reversed(family.kinds) if kind == tower))
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    inputs = family.inputs(5)
    lengths = [1] * 5 if form == "placeholder" else family.stock_lengths(model, inputs)
    firsts = np.cumsum([0] + [num_images for _, num_images in MIXED]).tolist()
    prompts = [prompt(family, items, lengths[first:]) for (items, _), first in zip(MIXED, firsts[:-1], strict=True)]
    longest = max(p.shape[1] for p in prompts)
    padded, masks = [], []
    for p in prompts:
        filler = torch.full((1, longest - p.shape[1]), 3)
        ones, zeros = torch.ones_like(p), torch.zeros_like(filler)
        padded.append(torch.cat([filler, p] if side == "left" else [p, filler], dim=1))
        masks.append(torch.cat([zeros, ones] if side == "left" else [ones, zeros], dim=1))
    ids, mask = torch.cat(padded), torch.cat(masks)
    together = vlm.forward(ids, mask, **inputs)
    prepared = vlm.prepare(ids, mask, **inputs)
    generated = vlm.generate(ids, mask, max_new_tokens=6, do_sample=False, **inputs)
    assert vlm.last_num_visual_tokens == [9 * count + family.num_added for count in family.num_crops(5)]
    for row, p in enumerate(prompts):
        own = some_of(inputs, firsts[row], firsts[row + 1])
        alone = vlm.forward(p, **own).logits[0]
        of_row = together.logits[row][prepared.attention_mask[row].bool()]
        torch.testing.assert_close(of_row, alone, rtol=0, atol=2e-4)
        assert prepared.attention_mask[row, 0 if side == "right" else -1] == 1
        tokens = vlm.generate(p, max_new_tokens=6, do_sample=False, **own)
        assert torch.equal(generated[row], tokens[0])


@each_family
@torch.no_grad()
def test_gradients_agree_with_finite_differences(family):
    """In float64: pixels -> tower -> kept and merged tokens -> projector -> inputs_embeds.

    Up to there and no further: Hugging Face's Llama computes its norms and loss in float32 whatever the model's type.
    """
    model = family.build().double()
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    ids = prompt(family, [5, "image", 7, 8])
    inputs = family.inputs(1)
    pixel_values = inputs.pop(family.pixels_name).double().requires_grad_()
    weight = vlm.adapter.projector.linear_1.weight
    length = 3 + 9 * family.crops[0] + family.num_added
    mixture = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss():
        return (vlm.prepare(ids, **{family.pixels_name: pixel_values}, **inputs).inputs_embeds * mixture).sum()

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


@each_family
def test_the_model_is_unchanged_by_use_and_by_an_exception(family):
    model = family.build()
    before = snapshot(model)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    ids, inputs = prompt(family, [5, "image", 7]), family.inputs(1)
    vlm.forward(ids, labels=ids, **inputs).loss.detach()
    vlm.generate(ids, max_new_tokens=2, **inputs)
    vlm.compressor = vzip.Identity()
    family.encode(vlm, inputs)
    assert changed(before, snapshot(model)) == []

    def fail(*_):
        raise MemoryError("no room")

    with_hook = family.tower(vlm).layers[2].mlp.register_forward_hook(fail)
    vlm.compressor = vzip.VisionZip(BUDGET)
    before = snapshot(model)
    with pytest.raises(MemoryError, match="no room"):
        vlm.generate(ids, max_new_tokens=2, **inputs)
    assert changed(before, snapshot(model)) == []
    with_hook.remove()


@each_family
@torch.no_grad()
def test_a_saved_model_comes_back(family, tmp_path):
    model = family.build()
    model.save_pretrained(tmp_path)
    vlm = vzip.load_vlm(tmp_path, compressor=vzip.VisionZip(BUDGET))
    assert type(vlm.model) is type(model) and not vlm.model.training and vlm.revision is None
    ids, inputs = prompt(family, [5, "image", 7, "image"]), family.inputs(2)
    original = vzip.CompressedVlm(model, vlm.compressor)
    assert torch.equal(vlm.forward(ids, **inputs).logits, original.forward(ids, **inputs).logits)
    assert vlm.last_num_visual_tokens == [9 * crops + family.num_added for crops in family.num_crops(2)]


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs(family, dtype):
    vlm = vzip.CompressedVlm(family.build().to(dtype), vzip.VisionZip(BUDGET))
    ids, one = prompt(family, [5, "image", 7]), family.inputs(1)
    output = vlm.forward(ids, **one)
    assert output.logits.dtype == dtype and torch.isfinite(output.logits).all()
    assert family.encode(vlm, family.inputs(2))[1].dtype == dtype
    assert vlm.generate(ids, max_new_tokens=3, **one).shape == (1, 3)
