"""The families with vLLM's modules: the same visual tokens as ``CompressedVlm``, whatever the method."""

from __future__ import annotations

import pytest
import torch

import vzip
from tests import methods, tiny
from tests.serving.like_vllm import like_vllm
from vzip.models.families.options import FamilyOptions
from vzip.serving.adapters import ServedAdapter, ServedLlava, ServedLlavaNext, served_adapter

BUDGET = vzip.TokenBudget(12, 4)
# Those that act inside the tower or read the question are refused, see test_settings.py.
SERVED = [
    name
    for name in methods.METHODS
    if name != "none"
    and (method := methods.build(name, BUDGET)).tower_use == "whole"
    and not method.reads_text
]


def served_tokens(adapter: ServedAdapter, inputs: dict, compressor: vzip.Compressor) -> list[torch.Tensor]:
    images = [{name: value[number] for name, value in inputs.items()} for number in range(len(inputs["pixel_values"]))]
    shapes = [adapter.shape(image) for image in images]
    crops = [adapter.crops(image, shape) for image, shape in zip(images, shapes, strict=True)]
    with torch.no_grad():
        return adapter.tokens(crops, shapes, compressor)


def compare(model, kind, inputs, compressor, options=FamilyOptions(), num_parts=1, gather=lambda heads: heads):
    own = {"drop_padding": options.drop_padding, "row_newline": options.row_newline}
    vlm = vzip.CompressedVlm(model, compressor, **own)
    with torch.no_grad():
        expected = vlm.encode_images(**inputs)
    found = served_tokens(kind(like_vllm(model, num_parts), options, gather), inputs, compressor)
    assert [len(tokens) for tokens in found] == [len(tokens) for tokens in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("name", SERVED)
def test_llava_has_the_tokens_of_compressed_vlm_with_every_method(name):
    compare(tiny.llava(), ServedLlava, tiny.llava_inputs(3), methods.build(name, BUDGET))


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


@pytest.mark.parametrize("name", ["visionzip", "vispruner", "flowcut_like_keys"])
def test_heads_of_several_processes_are_gathered_before_anything_is_chosen(name):
    """One process has half of the heads; with them alone it would keep other tokens."""
    model = tiny.llava()
    compressor = vzip.VisionZip(BUDGET) if name == "flowcut_like_keys" else methods.build(name, BUDGET)
    others: dict[tuple, torch.Tensor] = {}
    served = like_vllm(model, 2)
    for layer in served.vision_tower.vision_model.encoder.layers:

        def keep(module, inputs):
            others["inputs"] = inputs

        layer.parts[1].attn.register_forward_pre_hook(keep)

    def gather(heads: torch.Tensor) -> torch.Tensor:
        # Of the other process's inputs the one that stands where these do: queries or keys.
        mine = inputs_of_first["inputs"]
        number = next(n for n, each in enumerate(mine) if each is heads)
        return torch.cat([heads, others["inputs"][number]], dim=-1)

    inputs_of_first: dict[str, tuple] = {}
    for layer in served.vision_tower.vision_model.encoder.layers:
        layer.parts[0].attn.register_forward_pre_hook(lambda _m, inputs: inputs_of_first.update(inputs=inputs))
    inputs = tiny.llava_inputs(3)
    found = served_tokens(ServedLlava(served, FamilyOptions(), gather), inputs, compressor)
    with torch.no_grad():
        expected = vzip.CompressedVlm(model, compressor).encode_images(**inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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
    assert hf == llava[::-1]
    assert served_adapter(model.config) == ("VzipLlavaNextForConditionalGeneration", ServedLlavaNext)
