"""PEFT checkpoints on top of a model: PEFT's own numbers, or an error, never a part of them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tiny import IMAGE_TOKEN

import vzip
from vzip.errors import CheckpointError, UnsupportedModelError
from vzip.models.weights import lora as lora_checks

TARGETS = r".*language_model.*\.(q_proj|v_proj)"
BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
IDS = torch.tensor([[5, IMAGE_TOKEN, 6]])
WEIGHTS = "adapter_model.safetensors"


def tuned(**settings):
    """A tiny LLaVA with LoRA layers that change something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers 5.23 renames
        model = get_peft_model(tiny.llava(vocab_size=320), LoraConfig(r=4, target_modules=TARGETS, **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def base(tmp_path):
    tiny.llava(vocab_size=320).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def lora(tmp_path):
    tuned().save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@torch.no_grad()
def logits(vlm):
    return vlm.forward(IDS, pixel_values=tiny.pixels(1)).logits


def rename(lora, change):
    save_file(change(load_file(lora / WEIGHTS)), lora / WEIGHTS, metadata={"format": "pt"})


def test_the_numbers_are_those_of_peft(base, lora):
    compressor = vzip.VisionZip(BUDGET)
    vlm = vzip.load_vlm(base, compressor=compressor, adapter_path=lora)
    expected = logits(vzip.CompressedVlm(tuned().get_base_model(), compressor))
    assert torch.equal(logits(vlm), expected)
    assert not torch.allclose(expected, logits(vzip.load_vlm(base, compressor=compressor)), atol=1e-2)
    assert not vlm.model.training
    assert not any(p.requires_grad for name, p in vlm.model.named_parameters() if "lora" in name)


def test_names_of_transformers_4_are_translated(base, lora):
    expected = logits(vzip.load_vlm(base, adapter_path=lora))
    rename(
        lora,
        lambda w: {k.replace("model.model.language_model.", "model.language_model.model."): v for k, v in w.items()},
    )
    assert torch.equal(logits(vzip.load_vlm(base, adapter_path=str(lora))), expected)


def test_a_projector_trained_with_it_comes_along_or_is_refused(base, tmp_path, monkeypatch):
    model = tuned(modules_to_save=["multi_modal_projector"])
    model.save_pretrained(tmp_path / "lora")
    if not transformers.__version__.startswith("5.17"):
        vlm = vzip.load_vlm(base, adapter_path=tmp_path / "lora")
        assert torch.equal(logits(vlm), logits(vzip.CompressedVlm(model.get_base_model(), vzip.Identity())))
    monkeypatch.setattr(transformers, "__version__", "5.17.0")  # whose loader does not find the module's place
    with pytest.raises(UnsupportedModelError, match=r"multi_modal_projector\).*transformers 5\.18\.0 does"):
        lora_checks.check_peft_checkpoint(tmp_path / "lora")


def test_tensors_that_do_not_fit_are_named(base, lora):
    whole = load_file(lora / WEIGHTS)
    first = next(iter(whole))
    rename(
        lora,
        lambda w: {k: v for k, v in w.items() if k != first} | {"base_model.model.odd.lora_A.weight": whole[first]},
    )
    with pytest.raises(CheckpointError, match=r"1 tensors are missing and 1 have no place .*odd"):
        vzip.load_vlm(base, adapter_path=lora)
    rename(lora, lambda w: {k: (v[:2].contiguous() if "lora_A" in k else v) for k, v in whole.items()})
    with pytest.raises(CheckpointError, match="does not fit LlavaForConditionalGeneration"):
        vzip.load_vlm(base, adapter_path=lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["no_such_layer"]}))
    with pytest.raises(CheckpointError, match="no_such_layer"):
        vzip.load_vlm(base, adapter_path=lora)


def test_what_is_no_peft_checkpoint_is_refused_before_weights_are_read(base, lora, monkeypatch, tmp_path):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "from_pretrained", read)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refused(message, error=CheckpointError, path=lora):
        with pytest.raises(error, match=message):
            vzip.load_vlm(base, adapter_path=path)

    refused("neither a directory", path=tmp_path / "absent")
    (lora / "non_lora_trainables.bin").write_bytes(b"x")
    refused("non_lora_trainables.bin")
    (lora / "non_lora_trainables.bin").unlink()
    (lora / WEIGHTS).rename(lora / "other")
    refused("holds no weights")
    (lora / "other").rename(lora / WEIGHTS)
    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM").save_pretrained(lora)
    refused("adds tokens to the prompt", UnsupportedModelError)
    (lora / "adapter_config.json").write_text("{")
    refused("not a readable PEFT checkpoint")
    (lora / "adapter_config.json").unlink()
    refused("no adapter_config.json")
