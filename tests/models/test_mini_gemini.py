"""Mini-Gemini: mining against the published numbers and plain loops, the tower by itself, the family's checks."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny, tiny_mini_gemini
from tests.isolation.snapshot import changed, snapshot
from tests.tiny import IMAGE_TOKEN
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import ConvNextConfig, ConvNextModel, LlamaConfig, SiglipVisionConfig

import vzip
from vzip.compressors import Signal
from vzip.errors import PromptError, UnsupportedModelError
from vzip.models.families import MiniGeminiAdapter
from vzip.models.families.mini_gemini import (
    HighResTower,
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
    PatchInfoMining,
)

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
SIDE = tiny_mini_gemini.SIDE


def prompt(items, length=1):
    return torch.tensor([[i for item in items for i in ([IMAGE_TOKEN] * length if item == "image" else [item])]])


@pytest.fixture(scope="module")
def model():
    return tiny_mini_gemini.mini_gemini()


@pytest.fixture
def oracle(golden):
    return load_file(golden / "mini_gemini_mining.safetensors")


def mined_by_loops(mining, patches, highres):
    """One image as the published description says it: every position of a window has a key and a value."""
    side = math.isqrt(patches.shape[1])
    window = highres.shape[2] // side
    result = []
    for patch in range(patches.shape[1]):
        query = mining.vlm_uni_query_projector(patches[0, patch])
        top, left = patch // side * window, patch % side * window
        cells = [highres[0, :, y, x] for y in range(top, top + window) for x in range(left, left + window)]
        keys = [mining.vlm_uni_aux_projector(cell) for cell in cells]
        values = [mining.vlm_uni_val_projector(cell) for cell in cells]
        exponentials = [math.exp(float(query @ key) / math.sqrt(len(query))) for key in keys]
        result.append(sum(e / sum(exponentials) * value for e, value in zip(exponentials, values, strict=True)))
    return torch.stack(result)[None]


@torch.no_grad()
def test_mining_and_projector_equal_the_published_code(oracle):
    mining = PatchInfoMining(32, 20)
    mining.load_state_dict({name: value for name, value in oracle.items() if name.startswith("vlm_uni_")})
    mined = mining(oracle["clip_patches"], oracle["highres_features"].float())
    torch.testing.assert_close(mined, oracle["mined"], rtol=0, atol=1e-5)
    projector = {name.removeprefix("mm_projector."): value for name, value in oracle.items() if "mm_proj" in name}
    hidden = functional.gelu(
        functional.linear(oracle["clip_patches"] + mined, projector["0.weight"], projector["0.bias"])
    )
    features = functional.linear(hidden, projector["2.weight"], projector["2.bias"])
    torch.testing.assert_close(features, oracle["image_features"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3])
@torch.no_grad()
def test_mining_equals_a_plain_loop_in_float64(window):
    torch.manual_seed(window)
    mining = PatchInfoMining(6, 5).double()
    for parameter in mining.parameters():
        parameter.normal_()
    patches = torch.randn(1, 9, 6, dtype=torch.float64)
    highres = torch.randn(1, 5, 3 * window, 3 * window, dtype=torch.float64)
    torch.testing.assert_close(mining(patches, highres), mined_by_loops(mining, patches, highres), rtol=0, atol=1e-12)


def test_mining_projects_patches_and_not_high_resolution_positions():
    """The published order of the sum projects all 64 x 64 positions of this image twice."""
    with torch.device("meta"):
        mining, patches, highres = PatchInfoMining(32, 60), torch.empty(1, 64, 32), torch.empty(1, 60, 64, 64)
        with FlopCounterMode(display=False) as counter:
            mining(patches, highres)
    of_projections = 64 * (32 * 32 + 2 * 32 * 60)
    of_attention = 2 * 64 * 64 * 60
    assert counter.get_total_flops() == 2 * (of_projections + of_attention)
    assert counter.get_total_flops() < 2 * 2 * 64 * 64 * 32 * 60 / 8


def test_gradients_of_mining_agree_with_finite_differences():
    torch.manual_seed(0)
    mining = PatchInfoMining(3, 2).double()
    patches = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    highres = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mining, (patches, highres))


@pytest.mark.parametrize(
    ("patches", "highres"), [((1, 8, 4), (1, 5, 6, 6)), ((1, 9, 4), (1, 5, 7, 7)), ((1, 9, 4), (1, 5, 6, 9))]
)
def test_mining_refuses_what_has_no_windows(patches, highres):
    with pytest.raises(ValueError, match=r"square grid"):
        PatchInfoMining(4, 5)(torch.zeros(patches), torch.zeros(highres))


def test_full_size_has_the_published_parameters():
    """torchvision gives convnext_large 197 767 336 parameters, classifier and its norm included."""
    with torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(MiniGeminiConfig(text_config=LlamaConfig())).model
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["high_res_tower"] == 197_767_336 - (1536 * 1000 + 1000) - 2 * 1536
    assert count["multi_modal_projector"] == 20_979_712
    assert model.high_res_tower(torch.empty(1, 3, 768, 768, device="meta")).shape == (1, 2880, 192, 192)


@torch.no_grad()
def test_the_high_resolution_tower_joins_the_stages_of_convnext():
    """Against transformers' own model with the same weights, and bilinear enlargement written out."""
    config = ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[2, 1, 1, 1], layer_scale_init_value=0.5)
    torch.manual_seed(0)
    stock = ConvNextModel(config).eval()
    tower = HighResTower(config).eval()
    weights = {name.replace("encoder.", ""): value for name, value in stock.state_dict().items()}
    tower.load_state_dict({name: value for name, value in weights.items() if not name.startswith("layernorm.")})
    pixels = torch.randn(2, 3, 64, 64)
    features = tower(pixels)
    assert features.shape == (2, 60, 16, 16)
    stages = stock(pixels, output_hidden_states=True).hidden_states[1:]
    start = 0
    for stage in stages:
        torch.testing.assert_close(
            features[:, start : start + stage.shape[1]], enlarged(stage, 16), rtol=1e-5, atol=1e-5
        )
        start += stage.shape[1]


def enlarged(image, side):
    """Bilinear, sample points at pixel centres, edges repeated."""
    centres = (torch.arange(side) + 0.5) * image.shape[2] / side - 0.5
    centres = centres.clamp(0, image.shape[2] - 1)
    low = centres.floor().long().clamp(max=max(image.shape[2] - 2, 0))
    high = (low + 1).clamp(max=image.shape[2] - 1)
    share = centres - low
    rows = image[:, :, low] * (1 - share)[:, None] + image[:, :, high] * share[:, None]
    return rows[..., low] * (1 - share) + rows[..., high] * share


@torch.no_grad()
def test_patches_are_mined_before_selection_and_cls_is_not(model):
    """Against mining by loops between a tower run and a compressor called by hand."""
    pixels = tiny_mini_gemini.inputs(1)["pixel_values"]
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    whole = model.model.vision_tower(model.model.low_res(pixels), output_hidden_states=True).hidden_states[-2]
    small = functional.interpolate(pixels, size=(112, 112), mode="bilinear", align_corners=False)
    assert torch.equal(small, model.model.low_res(pixels))
    mined = mined_by_loops(model.model.patch_info_mining, whole[:, 1:], model.model.high_res_tower(pixels))
    assert mined.abs().mean() > 0.1 * whole[:, 1:].abs().mean()  # not a detail of the result
    vision = vlm.adapter.image_output(vlm.adapter.read_inputs(pixel_values=pixels), vlm.compressor.reads())
    assert torch.equal(vision.hidden[:, 0], whole[:, 0])
    torch.testing.assert_close(vision.hidden[:, 1:], whole[:, 1:] + mined, rtol=0, atol=1e-4)
    plain = tiny.llava()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    llava = vzip.CompressedVlm(plain, vlm.compressor).adapter
    of_llava = llava.image_output(llava.read_inputs(pixel_values=small), vlm.compressor.reads())
    torch.testing.assert_close(vision.attention, of_llava.attention)
    torch.testing.assert_close(vision.keys, of_llava.keys)
    tokens = model.model.multi_modal_projector(vlm.compressor(vision).tokens)[0]
    torch.testing.assert_close(vlm.encode_images(pixels)[0], tokens)


@torch.no_grad()
def test_each_tower_matters(model):
    """The high-resolution image cannot be told from its low-resolution copy by CLIP alone."""
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    pixels = tiny_mini_gemini.inputs(1)["pixel_values"]
    checker = torch.tensor([1.0, -1.0]).repeat(SIDE // 2)
    noisy = pixels + checker[:, None] * checker
    without_detail = [vlm.adapter.model.model.low_res(values) for values in (pixels, noisy)]
    same_in_the_middle = (without_detail[0] - without_detail[1]).abs().median()
    assert same_in_the_middle < (pixels - noisy).abs().median() / 2
    assert not torch.allclose(vlm.encode_images(pixels)[0], vlm.encode_images(noisy)[0], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_near_float32(dtype):
    whole, half = tiny_mini_gemini.mini_gemini(), tiny_mini_gemini.mini_gemini().to(dtype)
    inputs = tiny_mini_gemini.inputs(2)
    wanted = vzip.CompressedVlm(whole, vzip.Identity()).encode_images(**inputs)[1]
    got = vzip.CompressedVlm(half, vzip.Identity()).encode_images(**inputs)[1]
    assert got.dtype == dtype
    assert (got.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    vlm = vzip.CompressedVlm(half, vzip.VisionZip(BUDGET))
    assert vlm.generate(prompt([5, "image", 7]), max_new_tokens=3, **tiny_mini_gemini.inputs(1)).shape == (1, 3)


def test_a_failing_high_resolution_tower_leaves_nothing_behind(model):
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))

    def fail(*_):
        raise MemoryError("no room")

    hook = model.model.high_res_tower.stages[2].register_forward_hook(fail)
    before = snapshot(model)
    with pytest.raises(MemoryError, match="no room"):
        vlm.generate(prompt([5, "image", 7]), max_new_tokens=2, **tiny_mini_gemini.inputs(1))
    assert changed(before, snapshot(model)) == []
    hook.remove()


@torch.no_grad()
def test_without_cls_the_budget_is_of_mined_patches_alone():
    model = tiny_mini_gemini.mini_gemini()
    inputs, ids = tiny_mini_gemini.inputs(2), prompt([5, "image", 7, "image"])
    whole = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    reads = whole.compressor.reads() | {Signal("keys", 1)}
    with_cls = whole.adapter.image_output(whole.adapter.read_inputs(**inputs), reads)
    stock = vzip.CompressedVlm(model, vzip.Identity()).forward(ids, **inputs).logits
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), drop_cls=True)
    vision = vlm.adapter.image_output(vlm.adapter.read_inputs(**inputs), reads)
    assert torch.equal(vision.read(Signal("keys", 1)), with_cls.read_patches(Signal("keys", 1)))
    assert torch.equal(vision.hidden, with_cls.hidden[:, 1:]) and torch.equal(vision.keys, with_cls.keys[:, 1:])
    assert torch.equal(vision.attention, with_cls.attention)
    best = with_cls.attention.topk(6).indices.sort().values
    assert torch.equal(vlm.compressor(vision).source_index, best)
    vlm.forward(ids, **inputs)
    assert vlm.last_num_visual_tokens == [9, 9]
    vlm.compressor = vzip.Identity()
    assert torch.equal(vlm.forward(ids, **inputs).logits, stock)
    with pytest.raises(vzip.errors.ConfigError, match="64 to choose from"):
        vlm.compressor = vzip.VisionZip(vzip.TokenBudget(60, 5))


@torch.no_grad()
def test_a_saved_model_comes_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    tiny_mini_gemini.processor().save_pretrained(tmp_path)
    vlm = vzip.load_vlm(tmp_path, compressor=vzip.VisionZip(BUDGET))
    assert type(vlm.model) is MiniGeminiForConditionalGeneration and not vlm.model.training
    ids, inputs = prompt([5, "image", 7]), tiny_mini_gemini.inputs(1)
    original = vzip.CompressedVlm(model, vlm.compressor)
    assert torch.equal(vlm.forward(ids, **inputs).logits, original.forward(ids, **inputs).logits)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 112, 112), rf"takes \[images, 3, {SIDE}, {SIDE}\], the high-resolution image"),
        ((1, 5, 3, SIDE, SIDE), r"takes \[images, 3, height, width\]"),
        ((1, 1, SIDE, SIDE), "high-resolution image"),
    ],
)
def test_pixels_of_another_shape_are_refused(model, shape, message):
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    with pytest.raises(PromptError, match=message):
        vlm.forward(prompt([5, "image"]), pixel_values=torch.zeros(shape))


def test_a_wrong_number_of_images_is_refused(model):
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    with pytest.raises(PromptError, match=r"2 <image> placeholders .* but 1 images"):
        vlm.forward(prompt([5, "image", "image"]), **tiny_mini_gemini.inputs(1))
    with pytest.raises(vzip.errors.ConfigError, match="drop_padding=True"):
        vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), drop_padding=True)
    with pytest.raises(ValueError, match="vision_feature_layer"):
        model.model.get_image_features(**tiny_mini_gemini.inputs(1), vision_feature_layer=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy=full"),
        ({"vision_config": SiglipVisionConfig(image_size=112, patch_size=14)}, "siglip_vision_model"),
        ({"high_res_image_size": 130}, r"high_res_image_size=130.*multiple of 32"),
        ({"vision_feature_layer": -9}, "vision_feature_layer=-9"),
    ],
)
def test_settings_that_cannot_be_mined_are_refused(changes, message):
    config = tiny_mini_gemini.config()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=message):
        MiniGeminiAdapter.check_config(config)
