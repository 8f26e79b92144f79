"""LoRA beside the projector: only they move, what is written is PEFT's, and it comes back the same or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from peft import PeftModel
from tests import tiny
from tests.train.kit import BUDGET, LORA, SETTINGS, Samples, dying_at, load_model, make_plan
from transformers import LlavaForConditionalGeneration

import vzip
from vzip.cli.merge import merge
from vzip.config.options import config_dir
from vzip.config.training import checked, settings_of, tuning_plan
from vzip.data.collate import Collator
from vzip.data.conversations import vicuna_v1
from vzip.errors import CheckpointError, ConfigError
from vzip.models.weights.lora_training import add_lora, is_lora, peft_arguments
from vzip.models.weights.tuned import read_tensors
from vzip.train.loop import train
from vzip.train.objective import AnswerLoss, ModelView
from vzip.train.settings import LoraSettings
from vzip.train.trainable import choose_trainable, num_trainable, parameter_groups

NUM_LORA = 2 * (4 * (32 + 32) + 4 * (32 + 16))  # two layers; the values have half as many heads
IDS = torch.tensor([[5, tiny.IMAGE_TOKEN, 6]])


@torch.no_grad()
def logits(vlm: vzip.CompressedVlm) -> torch.Tensor:
    return vlm.forward(IDS, pixel_values=tiny.pixels(1)).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vlm, directory = load_model(), tmp_path_factory.mktemp("base")
    vlm.model.save_pretrained(directory)
    vlm.processor.save_pretrained(directory)  # type: ignore[union-attr]  # the tiny model has one
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[vzip.CompressedVlm, Path]:
    """The model as training left it, and what it wrote."""
    loaded: list[vzip.CompressedVlm] = []

    def load(precision: str) -> vzip.CompressedVlm:
        loaded.append(load_model())
        return loaded[-1]

    final = train(make_plan(tmp_path_factory.mktemp("run"), load_model=load, lora=LORA))
    loaded[0].model.eval()
    return loaded[0], final


def test_only_lora_and_projector_move(trained: Any) -> None:
    vlm, final = trained
    before, after = load_model().model.state_dict(), vlm.model.state_dict()
    moved = {n for n, t in before.items() if not torch.equal(t, after.get(n, after.get(_beside_lora(n))))}
    assert moved == {name for name in before if "multi_modal_projector" in name} and len(moved) == 4
    layers = {name for name in after if is_lora(name)}
    assert len(layers) == 8 and all("language_model.layers" in name for name in layers), "none in the vision tower"
    assert all(after[name].abs().max() > 0 for name in layers), "the second matrix begins at zero: it has learned"
    saved = read_tensors(final)
    assert set(saved) == moved | layers and all(torch.equal(tensor, after[name]) for name, tensor in saved.items())
    header = json.loads((final / "tuned.json").read_text())
    assert header["num_parameters"] == 32 * 32 * 2 + 64 + NUM_LORA


def _beside_lora(name: str) -> str:
    """Where a linear layer's weight is once there is a LoRA layer around it."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}"


def test_it_comes_back_by_our_way_and_by_that_of_peft(trained: Any, base: Path) -> None:
    vlm, final = trained
    loaded = vzip.load_vlm(base, compressor=vlm.compressor, projector=final)
    assert torch.equal(logits(loaded), logits(vlm))
    assert not any(parameter.requires_grad for name, parameter in loaded.model.named_parameters() if is_lora(name))

    stock = LlavaForConditionalGeneration.from_pretrained(base).eval()
    projector = {n: t for n, t in vlm.model.state_dict().items() if "multi_modal_projector" in n}
    assert not stock.load_state_dict(projector, strict=False).unexpected_keys
    without = logits(vzip.CompressedVlm(stock, vlm.compressor))
    assert not torch.allclose(without, logits(vlm), atol=1e-2), "the layers do something"
    peft = PeftModel.from_pretrained(stock, str(final / "lora")).get_base_model()
    assert torch.equal(logits(vzip.CompressedVlm(peft, vlm.compressor)), logits(vlm))


def test_merged_it_is_a_plain_checkpoint(trained: Any, base: Path, tmp_path: Path) -> None:
    vlm, final = trained
    merge(final, tmp_path / "merged", str(base))
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    name = "model.language_model.layers.1.self_attn.v_proj"
    lora = vlm.model.get_submodule(name)
    product = lora.lora_B.default.weight @ lora.lora_A.default.weight
    expected = load_model().model.get_parameter(f"{name}.weight") + LORA.alpha / LORA.r * product
    assert torch.allclose(stock.get_parameter(f"{name}.weight"), expected, atol=1e-6)
    merged = vzip.CompressedVlm(stock, vlm.compressor)
    assert torch.allclose(logits(merged), logits(vlm), atol=1e-4)


def test_a_killed_run_goes_on_as_if_nothing_had_been(plan: Any, trained: Any) -> None:
    with dying_at(5):
        train(plan("cut", lora=LORA))
    again, whole = read_tensors(train(plan("cut", lora=LORA))), read_tensors(trained[1])
    assert set(again) == set(whole) and all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_rates_precision_and_report() -> None:
    vlm = load_model()
    vlm.model.to(torch.bfloat16)
    settings = dataclasses.replace(SETTINGS, precision="bfloat16", lora=LORA)
    line = choose_trainable(vlm, settings, in_float32=True)
    assert f"(projector 2,112, LoRA in the language model {NUM_LORA:,})" in line
    assert num_trainable(vlm) == 2112 + NUM_LORA
    projector, lora = parameter_groups(vlm, settings)
    assert (projector["peak"], lora["peak"]) == (1e-2, 3e-2)
    assert sum(p.numel() for p in projector["params"]) == 2112
    assert {p.dtype for p in (*projector["params"], *lora["params"])} == {torch.float32}
    # DeepSpeed keeps the float32 copies itself, and wants one precision.
    vlm = load_model()
    vlm.model.to(torch.bfloat16)
    choose_trainable(vlm, settings, in_float32=False)
    assert {parameter.dtype for parameter in vlm.model.parameters()} == {torch.bfloat16}


def test_what_cannot_be(trained: Any, base: Path, tmp_path: Path) -> None:
    adapter = load_model().adapter
    with pytest.raises(ConfigError, match=r"names q_prj, but the language model .*\(did you mean 'q_proj'\?\)"):
        peft_arguments(adapter, 4, 8, 0.0, ["q_prj"])
    with pytest.raises(ConfigError, match=r"train\.lora has nothing to add"):
        dataclasses.replace(SETTINGS, parts=("projector", "language_model"), lora=LORA)
    final = Path(shutil.copytree(trained[1], tmp_path / "final"))
    budget = vzip.VisionZip(BUDGET)
    with pytest.raises(CheckpointError, match=r"set model\.adapter_path=null"):
        vzip.load_vlm(base, compressor=budget, projector=final, adapter_path=final / "lora")
    weights = final / "lora/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: damaged"):
        vzip.load_vlm(base, compressor=budget, projector=final)
    weights.unlink()
    with pytest.raises(CheckpointError, match="copy the whole directory"):
        vzip.load_vlm(base, compressor=budget, projector=final)


def test_new_layers_change_nothing() -> None:
    vlm, other = load_model(), load_model()
    add_lora(vlm.adapter, peft_arguments(vlm.adapter, 4, 8, 0.0, ["q_proj", "down_proj"]))
    assert torch.equal(logits(vlm), logits(other))


def test_as_a_setting() -> None:
    def composed(*words: str) -> dict[str, Any]:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return checked(compose("train", ["+exp=llava15_7b_64tok", "train=projector_lora", *words]))

    # LLaVA scripts/v1_5/finetune_lora.sh and the defaults of llava/train/train.py.
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    published, _ = settings_of(composed())
    assert published.lora == LoraSettings(r=128, alpha=256, dropout=0.05, target_modules=layers, learning_rate=2e-4)
    assert (published.learning_rate, published.samples_per_step) == (2e-5, 128)
    settings, _ = settings_of(composed("train.lora.r=16"))
    assert settings.parts == ("projector",) and settings.lora is not None
    assert (settings.lora.r, settings.lora.alpha, settings.lora.learning_rate) == (16, 256, 2e-4)
    with pytest.raises(ConfigError, match=r"train\.lora\.r=0: must be a whole number, 1 or more"):
        composed("train.lora.r=0")
    with pytest.raises(ConfigError, match=r"train\.lora on top of model\.adapter_path=some/lora"):
        tuning_plan(composed("model.adapter_path=some/lora"))


@pytest.mark.parametrize("empty", [False, True])
def test_a_batch_without_images_runs_the_whole_model_and_counts_nothing(empty: bool) -> None:
    vlm = load_model()
    settings = dataclasses.replace(SETTINGS, lora=dataclasses.replace(LORA, dropout=0.0))
    choose_trainable(vlm, settings, in_float32=True)
    collate = Collator(vlm.processor, ModelView(vlm), vicuna_v1, None, tiny.IMAGE_TOKEN, 200)
    batch = collate([Samples()[5]])
    assert not batch.image_of and batch.sample_of
    if empty:
        batch = dataclasses.replace(batch, sample_of=[])
    whole = AnswerLoss(vlm, always_whole=True)(batch)
    plain = AnswerLoss(vlm)(batch)
    assert torch.equal(whole, plain) and bool(plain.any()) is not empty
    whole.sum().backward()
    for name, parameter in vlm.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if empty or not is_lora(name):
                assert not parameter.grad.any()
