"""The wrapper's own surface: inputs, refusals, measured counts, swapping, freezing."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tests import tiny
from tests.tiny import IMAGE_TOKEN

import vzip
from vzip.errors import ConfigError, ImageError, PromptError, UnsupportedModelError
from vzip.models.freeze import train_projector_only

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


@pytest.fixture(scope="module")
def vlm():
    return vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.VisionZip(BUDGET), processor=tiny.processor())


def picture(colour="red", size=(30, 50)):
    return Image.new("RGB", size, colour)


def test_text_and_images_to_answers(vlm):
    texts = ["<image> what is it?", "hello", "<image> and <image>?"]
    images = [[picture()], [], [picture("blue"), picture("green", (200, 10))]]
    inputs = vlm.build_inputs(texts, images)
    assert inputs["pixel_values"].shape == (3, 3, 112, 112)
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum(dim=1).tolist() == [1, 0, 2]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1] and inputs["attention_mask"][1, 0] == 0
    out = vlm.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert out.shape == (3, 4)
    assert vlm.last_num_visual_tokens == [9, 9, 9]
    one = vlm.generate(**vlm.build_inputs(texts[2:], images[2:]), max_new_tokens=4, do_sample=False)
    assert torch.equal(out[2:], one)


def test_build_inputs_agrees_with_the_processors_own_call(vlm):
    text = "<image> what is it?"
    ours = vlm.build_inputs([text], [[picture(size=(112, 112))]])
    theirs = vlm.processor(text=[text], images=[picture(size=(112, 112))], return_tensors="pt")
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    prepared = [
        vlm.prepare(i["input_ids"], i["attention_mask"], pixel_values=i["pixel_values"]) for i in (ours, theirs)
    ]
    assert torch.equal(prepared[0].inputs_embeds, prepared[1].inputs_embeds)


def test_text_only_needs_no_pixels(vlm):
    inputs = vlm.build_inputs(["hello", "a longer one"], [[], []])
    assert set(inputs) == {"input_ids", "attention_mask"}
    vlm.generate(**inputs, max_new_tokens=2)
    assert vlm.last_num_visual_tokens == []


def test_the_two_preprocess_rules():
    model, processor = tiny.llava(), tiny.processor()
    gradient = Image.linear_gradient("L").resize((300, 100)).convert("RGB")
    results = {}
    for rule in ("llava", "hf"):
        vlm = vzip.CompressedVlm(model, vzip.Identity(), processor, preprocess=rule)
        results[rule] = vlm.preprocess_images([gradient])["pixel_values"]
    assert torch.equal(results["hf"], processor.image_processor([gradient], return_tensors="pt")["pixel_values"])
    assert results["llava"][0, :, 0].abs().max() < 0.02 and results["hf"][0, :, 0].abs().max() > 0.5  # padded; cut


def test_mismatches_are_refused_before_any_image_is_encoded(vlm, monkeypatch):
    monkeypatch.setattr(vlm.adapter, "encode", None)  # calling it would fail
    with pytest.raises(PromptError, match=r"Prompt 1 holds 0 <image> placeholders but 1 images"):
        vlm.build_inputs(["<image> a", "b"], [[picture()], [picture()]])
    with pytest.raises(PromptError, match="2 prompts but 1 lists"):
        vlm.build_inputs(["a", "b"], [[]])
    with pytest.raises(PromptError, match=r"1 <image> placeholders .*but 2 images"):
        vlm.prepare(torch.tensor([[5, IMAGE_TOKEN]]), pixel_values=tiny.pixels(2))
    with pytest.raises(PromptError, match=r"1 <image> placeholders .*but 0 images"):
        vlm.generate(torch.tensor([[5, IMAGE_TOKEN]]))
    with pytest.raises(ImageError):
        vlm.build_inputs(["<image>"], [[Image.new("RGB", (0, 0))]])


def test_pixels_of_another_model_are_named(vlm):
    ids = torch.tensor([[5, IMAGE_TOKEN]])
    with pytest.raises(PromptError, match=r"\(1, 5, 3, 112, 112\).*\[images, 3, height, width\]"):
        vlm.prepare(ids, pixel_values=torch.zeros(1, 5, 3, 112, 112))
    with pytest.raises(PromptError, match=r"\(1, 3, 224, 224\)"):
        vlm.prepare(ids, pixel_values=torch.zeros(1, 3, 224, 224))


def test_settings_that_cannot_work_are_refused(vlm):
    ids = torch.tensor([[5, 6]])
    for name in ("inputs_embeds", "position_ids", "past_key_values"):
        for call in (vlm.forward, vlm.generate):
            with pytest.raises(PromptError, match=name):
                call(ids, **{name: torch.zeros(1, 2)})
    with pytest.raises(ConfigError, match="use_cache=False"):
        vlm.generate(ids, use_cache=False)
    with pytest.raises(ConfigError, match="did you mean 'llava'"):
        vzip.CompressedVlm(vlm.model, vzip.Identity(), preprocess="lava")
    with pytest.raises(ConfigError, match="processor"):
        vzip.CompressedVlm(vlm.model, vzip.Identity()).build_inputs(["a"], [[]])
    with pytest.raises(ConfigError, match=r"vzip\.Compressor"):
        vzip.CompressedVlm(vlm.model, vzip.VisionZip)


def test_a_budget_that_does_not_fit_is_refused_when_set(vlm):
    with pytest.raises(ConfigError, match="65 to choose from"):
        vzip.CompressedVlm(vlm.model, vzip.VisionZip(vzip.TokenBudget(54, 12)))
    kept = vlm.compressor
    with pytest.raises(ConfigError, match="64 to choose from"):
        vlm.compressor = vzip.RandomTokens(vzip.TokenBudget(64, 1))
    assert vlm.compressor is kept


@torch.no_grad()
def test_the_compressor_can_be_swapped(vlm):
    ids = torch.tensor([[5, IMAGE_TOKEN, 6]])
    kept = vlm.compressor
    for compressor, count in [(vzip.Identity(), 64), (vzip.UniformTokens(BUDGET), 9), (kept, 9)]:
        vlm.compressor = compressor
        assert vlm.forward(ids, pixel_values=tiny.pixels(1)).logits.shape[1] == count + 2
        assert vlm.last_num_visual_tokens == [count]
        assert [tuple(image.shape) for image in vlm.encode_images(tiny.pixels(2))] == [(count, 32)] * 2


@torch.no_grad()
def test_one_encoding_runs_the_tower_once_for_the_whole_batch(vlm):
    calls = []
    handle = vlm.adapter.tower.layers[0].register_forward_hook(lambda *_: calls.append(1))
    vlm.encode_images(tiny.pixels(5))
    handle.remove()
    assert calls == [1]


def test_unknown_classes_and_layer_lists_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"Linear has no adapter.*LlavaForConditionalGeneration"):
        vzip.CompressedVlm(torch.nn.Linear(1, 1), vzip.Identity())
    with pytest.raises(UnsupportedModelError, match=r"\[-2, -3\]"):
        vzip.CompressedVlm(tiny.llava(select_layer=[-2, -3]), vzip.Identity())


def test_only_the_projector_trains():
    model = tiny.llava()
    names = train_projector_only(model)
    assert names == [f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    ids = torch.tensor([[5, IMAGE_TOKEN, 6, 7]])
    vlm.forward(ids, pixel_values=tiny.pixels(1), labels=ids).loss.backward()
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient == names
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in names)
