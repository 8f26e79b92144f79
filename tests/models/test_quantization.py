"""Quantization: the language model alone, for every family; with bitsandbytes itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests import mgm_layout, tiny, tiny_mini_gemini
from tests.families import FAMILIES
from tests.models.quantizable import blocks_of_64
from transformers import LlavaForConditionalGeneration

import vzip
from vzip import installed
from vzip.errors import ConfigError, MissingPackageError
from vzip.models import load
from vzip.models.families import adapter_for_model
from vzip.models.weights import quantization

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    blocks_of_64(tiny.llava(vocab_size=320)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_without_bitsandbytes_it_is_named_before_weights_are_read(checkpoint, monkeypatch, name) -> None:
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", read)
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=f"model.quantization={name} needs the package bitsandbytes"):
        vzip.load_vlm(checkpoint, quantization=name)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_everything_but_the_language_model_is_left_alone(family) -> None:
    model = family.build()
    adapter = adapter_for_model(model)
    left_alone = quantization.modules_outside(model, adapter.language_model)
    inside = {id(module) for module in adapter.language_model.modules()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            covered = any(name == part or name.startswith(f"{part}.") for part in left_alone)
            assert covered == (id(module) not in inside), name
    assert "lm_head" in left_alone and "model.multi_modal_projector" in left_alone


def test_the_settings_name_what_is_left_alone_and_the_dtype(monkeypatch) -> None:
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda _: object())
    model = tiny.llava()
    for name in quantization.QUANTIZATIONS:
        settings = load._quantization_settings(type(adapter_for_model(model)), model.config, name, "bfloat16")
        config = settings["quantization_config"]
        assert settings["dtype"] == torch.bfloat16
        assert set(config.llm_int8_skip_modules) == {"model.vision_tower", "model.multi_modal_projector", "lm_head"}
        assert (config.load_in_8bit, config.load_in_4bit) == (name == "8bit", name == "4bit")
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16


def test_auto_is_the_dtype_of_the_checkpoint() -> None:
    half = SimpleNamespace(dtype=torch.float16)
    assert quantization.compute_dtype("auto", half) == torch.float16
    assert quantization.compute_dtype(torch.bfloat16, half) == torch.bfloat16
    assert quantization.compute_dtype("auto", SimpleNamespace(dtype=None)) == torch.float32
    with pytest.raises(ConfigError, match="quantized already"):
        quantization.compute_dtype("auto", SimpleNamespace(quantization_config={"load_in_4bit": True}))


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@torch.no_grad()
def check_quantized(name: str, directory: Path, family: tiny.Family, image_token: int | None = None) -> None:
    """A quantized language model computes nearly the same, and everything else is exact."""
    compressor = vzip.VisionZip(BUDGET)
    whole = vzip.load_vlm(directory, compressor=compressor)
    vlm = vzip.load_vlm(directory, quantization=name, compressor=compressor)
    kinds = {type(module).__name__ for module in vlm.adapter.language_model.modules()}
    assert ("Linear8bitLt" if name == "8bit" else "Linear4bit") in kinds and "Linear" not in kinds
    inside = {id(module) for module in vlm.adapter.language_model.modules()}
    outside = [module for module in vlm.model.modules() if id(module) not in inside]
    assert not {type(module).__name__ for module in outside} & {"Linear8bitLt", "Linear4bit"}
    own = [parameter for module in outside for parameter in module.parameters(recurse=False)]
    assert {parameter.dtype for parameter in own} == {torch.bfloat16}
    ids, inputs = torch.tensor([[5, image_token or family.token, 6]]), family.inputs(1)
    there = {key: tensor.to(vlm.device) for key, tensor in inputs.items()}
    assert torch.equal(family.encode(vlm, there)[0].cpu(), family.encode(whole, inputs)[0])
    ours, exact = vlm.forward(ids, **there).logits.cpu(), whole.forward(ids, **inputs).logits
    difference = (ours - exact).float().norm() / exact.float().norm()
    assert 0 < difference < (0.05 if name == "8bit" else 0.25)
    assert vlm.generate(ids, **there, max_new_tokens=3).shape == (1, 3)


@needs_bitsandbytes
@pytest.mark.parametrize("name", quantization.QUANTIZATIONS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_quantized_language_model_is_close_and_the_rest_exact(family, name, tmp_path) -> None:
    blocks_of_64(family.build(vocab_size=320)).save_pretrained(tmp_path)
    check_quantized(name, tmp_path, family)


@needs_bitsandbytes
@pytest.mark.parametrize("name", quantization.QUANTIZATIONS)
def test_the_published_layout_of_mini_gemini_is_quantized_alike(name, tmp_path) -> None:
    model = blocks_of_64(tiny_mini_gemini.mini_gemini(vocab_size=mgm_layout.VOCABULARY))
    directory = mgm_layout.save_all(model, tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    check_quantized(name, directory, tiny_mini_gemini.FAMILY, image_token=mgm_layout.VOCABULARY)


@needs_bitsandbytes
@pytest.mark.parametrize("name", quantization.QUANTIZATIONS)
@torch.no_grad()
def test_a_peft_checkpoint_goes_on_top_of_a_quantized_model(checkpoint, name, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    whole = vzip.load_vlm(checkpoint)
    ids, pixels = torch.tensor([[5, tiny.IMAGE_TOKEN, 6]]), tiny.pixels(1)
    before = whole.forward(ids, pixel_values=pixels).logits
    tuned = peft.get_peft_model(whole.model, peft.LoraConfig(r=4, target_modules=r".*language_model.*v_proj")).eval()
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.save_pretrained(tmp_path / "lora")
    wanted = whole.forward(ids, pixel_values=pixels).logits - before  # the layers are in its model now
    after, without = (
        vzip.load_vlm(checkpoint, quantization=name, adapter_path=path).forward(ids, pixel_values=pixels).logits.cpu()
        for path in (tmp_path / "lora", None)
    )
    change = (after - without).flatten().float()
    assert torch.nn.functional.cosine_similarity(change, wanted.flatten().float(), dim=0) > 0.9
