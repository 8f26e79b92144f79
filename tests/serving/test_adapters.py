"""The families with vLLM's modules: the same visual tokens as ``CompressedVlm``, whatever the method."""

from __future__ import annotations

import pytest
import torch
from tests import methods, tiny
from tests.serving.like_vllm import like_vllm

import vzip
from vzip.errors import PromptError
from vzip.models.families.options import FamilyOptions
from vzip.serving.adapters import ServedAdapter, ServedLlava, ServedLlavaNext, served_adapter

BUDGET, NO_OPTIONS = vzip.TokenBudget(12, 4), FamilyOptions()
SETTINGS = {"vscan": {"local_layer": 2}}  # of the small tower's four
# Those that act inside the tower or read the question are refused, see test_settings.py.
SERVED = [
    name
    for name in methods.METHODS
    if name != "none" and (method := methods.build(name, BUDGET)).tower_use == "whole" and not method.reads_text
]


def served_tokens(adapter: ServedAdapter, inputs: dict, compressor: vzip.Compressor) -> list[torch.Tensor]:
    images = [{name: value[number] for name, value in inputs.items()} for number in range(len(inputs["pixel_values"]))]
    shapes = [adapter.shape(image) for image in images]
    crops = [adapter.crops(image, shape) for image, shape in zip(images, shapes, strict=True)]
    with torch.no_grad():
        return adapter.tokens(crops, shapes, compressor)


def compare(model, kind, inputs, compressor, options=NO_OPTIONS):
    own = {"drop_padding": options.drop_padding, "row_newline": options.row_newline}
    vlm = vzip.CompressedVlm(model, compressor, **own)
    with torch.no_grad():
        expected = vlm.encode_images(**inputs)
    parts = like_vllm(model, kind.num_layers(model.config, compressor))
    found = served_tokens(kind(parts, options, lambda heads: heads), inputs, compressor)
    assert [len(tokens) for tokens in found] == [len(tokens) for tokens in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("name", SERVED)
def test_llava_has_the_tokens_of_compressed_vlm_with_every_method(name):
    compare(tiny.llava(), ServedLlava, tiny.llava_inputs(3), methods.build(name, BUDGET, **SETTINGS.get(name, {})))


@pytest.mark.parametrize("name", ["visionzip", "divprune", "fastervlm", "prunesid"])
def test_llava_next_has_them_too(name):
    compare(tiny.llava_next(), ServedLlavaNext, tiny.next_inputs(4), methods.build(name, BUDGET))


@pytest.mark.parametrize("options", [FamilyOptions(True, False), FamilyOptions(True, True)], ids=str)
def test_llava_next_with_its_options(options):
    compare(tiny.llava_next(), ServedLlavaNext, tiny.next_inputs(4), vzip.VisionZip(BUDGET), options)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_a_siglip_tower_has_them_too(strategy):
    compare(tiny.llava("siglip", strategy), ServedLlava, tiny.llava_inputs(2), vzip.VisionZip(BUDGET))


@pytest.mark.parametrize("kind", [ServedLlava, ServedLlavaNext])
def test_without_compression_it_is_the_stock_models_output(kind):
    next_model = kind is ServedLlavaNext
    model, inputs = (tiny.llava_next(), tiny.next_inputs(3)) if next_model else (tiny.llava(), tiny.llava_inputs(3))
    found = compare(model, kind, inputs, vzip.Identity())
    with torch.no_grad():
        stock = model.model.get_image_features(**inputs).pooler_output
    for ours, theirs in zip(found, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["visionzip", "vispruner"])
def test_heads_of_several_processes_are_gathered_before_anything_is_chosen(name):
    """One process has half of the heads: from these alone it would choose other tokens, each process its own."""
    model, compressor, inputs = tiny.llava(), methods.build(name, BUDGET), tiny.llava_inputs(3)
    parts = like_vllm(model, ServedLlava.num_layers(model.config, compressor), num_parts=2)
    calls: list[tuple[torch.Tensor, ...]] = []  # what the two halves of a layer's heads were called with, in turn
    for layer in parts.vision_tower.vision_model.encoder.layers:
        for half in reversed(layer.parts):
            half.attn.register_forward_pre_hook(lambda _module, given: calls.append(given))

    def gather(heads: torch.Tensor) -> torch.Tensor:
        others, mine = calls[-2:]
        return torch.cat([heads, next(o for o, m in zip(others, mine, strict=True) if m is heads)], dim=-1)

    with torch.no_grad():
        expected = vzip.CompressedVlm(model, compressor).encode_images(**inputs)
    found = served_tokens(ServedLlava(parts, FamilyOptions(), gather), inputs, compressor)
    alone = served_tokens(
        ServedLlava(parts, FamilyOptions(), lambda heads: torch.cat([heads, heads], -1)), inputs, compressor
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(alone, expected, strict=True))


def test_counts_need_no_model():
    """By the size of an image alone what its tensors come to, for either rule that cuts it."""
    model = tiny.llava_next()
    adapter = ServedLlavaNext.of_config(model.config, FamilyOptions(row_newline=True))
    inputs, compressor = tiny.next_inputs(4), vzip.VisionZip(BUDGET)
    vlm = vzip.CompressedVlm(model, compressor, row_newline=True)
    expected = vlm.expected_num_visual_tokens(**inputs)
    sizes = inputs["image_sizes"].tolist()
    for preprocess in ("hf", "llava"):
        shapes = [adapter.shape(adapter.blank(height, width, preprocess)) for height, width in sizes]
        assert [compressor.num_visual_tokens(shape) for shape in shapes] == expected
    # Square and small: the two rules take each other's transpose.
    hf, llava = (adapter.shape(adapter.blank(100, 100, each)).tiles for each in ("hf", "llava"))
    assert hf == llava[::-1] and hf != llava
    model.config.architectures = ["LlavaNextForConditionalGeneration"]
    assert served_adapter(model.config) == ("VzipLlavaNextForConditionalGeneration", ServedLlavaNext)


def test_pixels_of_another_size_are_refused_before_they_reach_the_engine():
    """As a request's own ``mm_processor_kwargs`` may make them."""
    for kind, model, shape in (
        (ServedLlava, tiny.llava(), (3, 8, 8)),
        (ServedLlavaNext, tiny.llava_next(), (5, 3, 8, 8)),
    ):
        adapter = kind.of_config(model.config, FamilyOptions())
        with pytest.raises(PromptError, match=r"8 x 8 pixels .* leave out of mm_processor_kwargs"):
            adapter.shape({"pixel_values": torch.zeros(shape), "image_sizes": torch.tensor([50, 50])})
