"""Video-LLaVA as published: the authors' towers to the number, their layout, their pixels, clips of eight frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.llava_layout import config_of
from tests.mgm_layout import VOCABULARY, save_shards, save_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel

import vzip
from vzip.compressors.vision import Signal
from vzip.errors import CheckpointError, ConfigError, ImageError, PromptError, UnsupportedModelError
from vzip.models.families.video_llava.modeling import PublishedVideoLlavaForConditionalGeneration
from vzip.models.families.video_llava.pixels import frame_pixels, image_pixels
from vzip.models.families.video_llava.published import REPOSITORIES, rename_checkpoint
from vzip.models.families.video_llava.tower import LanguageBindVideoTower
from vzip.models.towers.structure import find_tower
from vzip.models.towers.tap import run_tower

GOLDEN = Path(__file__).parents[1] / "golden" / "languagebind_tiny"
BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
TOWERS = {"image": CLIPVisionModel, "video16": LanguageBindVideoTower}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_states_attention_and_keys_are_those_of_the_authors_towers(name):
    given = json.loads((GOLDEN / "config.json").read_text())["image_vision_config"]
    own = {key: value for key, value in given.items() if key not in ("lora_r", "add_time_attn", "num_frames")}
    module = TOWERS[name](CLIPVisionConfig(**own)).eval()
    weights = {
        rename_checkpoint(key): value.float() for key, value in load_file(GOLDEN / "weights.safetensors").items()
    }
    prefix = f"model.{name.removesuffix('16')}_tower."
    module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    pixels = load_file(GOLDEN / "inputs.safetensors")[f"{name}.pixel_values"]
    pixels = pixels if name == "image" else pixels.transpose(1, 2).flatten(0, 1)
    expected = {
        key.removeprefix(f"{name}."): value.flatten(0, -3)
        for key, value in load_file(GOLDEN / "outputs.safetensors").items()
        if key.startswith(name)
    }
    found = run_tower(find_tower(module), pixels, -2, [Signal("attention"), Signal("keys")])
    close = {"rtol": 0, "atol": 3e-5}
    torch.testing.assert_close(found.hidden, expected["hidden_states.2"], **close)
    torch.testing.assert_close(found.attention, expected["cls_attention.1"][..., 1:].sum(1), **close)
    torch.testing.assert_close(found.keys, expected["keys.1"].unflatten(-1, (4, -1)).mean(2), **close)
    module.set_attn_implementation("eager")
    stock = module(pixels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(stock.hidden_states[-2], expected["hidden_states.2"], **close)
    assert len(stock.attentions) == 3  # the spatial ones alone


@pytest.fixture(scope="module")
def model():
    return tiny.build("video_llava_published", vocab_size=VOCABULARY, video_token_index=5)


def videos(num_videos, num_frames=8):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num_videos, num_frames, 3, 112, 112, generator=generator)


@torch.no_grad()
def test_the_wrapped_model_is_the_stock_one_and_clips_know_nothing_of_each_other(model):
    vlm, pixels = vzip.CompressedVlm(model, vzip.Identity(), tiny.video_processor()), videos(2, 16)
    ids = torch.tensor([[6, 5, 7]] * 2)
    expanded = torch.tensor([[6, *[5] * (16 * 65), 7]] * 2)
    stock = model(expanded, pixel_values_videos=pixels).logits
    assert torch.equal(vlm.forward(ids, pixel_values_videos=pixels).logits, stock)
    vlm.compressor = vzip.VisionZip(BUDGET)
    both, alone = vlm.encode_videos(pixels), [vlm.encode_videos(own[None])[0] for own in pixels]
    halves = torch.cat([vlm.encode_videos(half[None])[0] for half in pixels[0].split(8)])
    for own, expected in zip((*both, both[0]), (*alone, halves), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    changed = pixels.clone()
    changed[0, 7] += 1
    other = vlm.encode_videos(changed)[0].split(9)
    moved = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(other, both[0].split(9), strict=True)]
    assert moved == [True] * 8 + [False] * 8  # a frame is seen by its own clip


def test_frames_come_in_clips_of_eight(model):
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), tiny.video_processor())
    with pytest.raises(PromptError, match=r"12 frames a video.*multiple of 8"):
        vlm.encode_videos(videos(1, 12))
    with pytest.raises(ConfigError, match=r"model.num_frames=12.*multiple of 8.*video_llava_7b_hf"):
        vzip.CompressedVlm(model, vzip.Identity(), tiny.video_processor(), num_frames=12)
    with pytest.raises(ConfigError, match=r"FlowCut drops patches inside.*its own place in the other frames"):
        vlm.compressor = vzip.compressors.FlowCut(BUDGET)


def save_all(model, root, inside=True, **changes):
    """As the authors publish it; without ``inside`` the towers lie beside it, as their own repositories."""
    directory = root / "Video-LLaVA"
    directory.mkdir(parents=True)
    own = {}
    towers = {key: {} for key in REPOSITORIES}
    for name, value in model.state_dict().items():
        medium = name.split(".")[1].removesuffix("_tower")
        if medium in ("image", "video"):
            rest = name.split(".", 2)[2]
            if inside:
                own[f"model.{medium}_tower.{medium}_tower.{rest}"] = value
            towers[f"mm_{medium}_tower"][f"vision_model.{rest}"] = value
            continue
        name = name.replace("model.language_model.", "model.").replace(
            "multi_modal_projector.linear_1", "mm_projector.0"
        )
        own[name.replace("multi_modal_projector.linear_2", "mm_projector.2")] = value
    for key, repository in REPOSITORIES.items():
        folder = root / repository.rpartition("/")[2]
        folder.mkdir()
        vision = model.config.vision_config.to_dict() | {"add_time_attn": key == "mm_video_tower", "num_frames": 8}
        (folder / "config.json").write_text(json.dumps({"model_type": "LanguageBind", "vision_config": vision}))
        if not inside:
            torch.save(towers[key] | {"logit_scale": torch.ones(())}, folder / "pytorch_model.bin")
    save_shards(own, directory, "bin", num_shards=2)
    save_tokenizer(directory)
    fields = config_of(model, mm_vision_tower=None, **REPOSITORIES) | changes
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize("inside", [True, False])
@torch.no_grad()
def test_the_authors_layout_is_the_model_it_was_made_from(model, tmp_path, inside):
    vlm = vzip.load_vlm(save_all(model, tmp_path, inside), compressor=vzip.VisionZip(BUDGET))
    assert type(vlm.model) is PublishedVideoLlavaForConditionalGeneration
    read, written = vlm.model.state_dict(), model.state_dict()
    assert read.keys() == written.keys() and sum("temporal" in name for name in read) == 11 * 4
    assert all(torch.equal(read[name][: len(written[name])], written[name]) for name in written)
    assert (vlm.adapter.image_token_id, vlm.adapter.video_token_id) == (VOCABULARY, VOCABULARY + 1)
    frames = [Image.new("RGB", (40, 30), (20 * number, 0, 90)) for number in range(8)]
    content = [{"type": "video"}, {"type": "text", "text": "what happens?"}]
    prompt = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt.startswith("A chat between a curious human") and prompt.endswith(
        "to the human's questions. USER: <video>\nwhat happens? ASSISTANT:"
    )
    inputs = vlm.build_inputs([prompt], videos=[[frames]])
    assert vlm.generate(**inputs, max_new_tokens=2).shape == (1, 2) and vlm.last_num_visual_tokens == [8 * 9]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mm_video_tower": "my/tower"}, UnsupportedModelError, "mm_video_tower=my/tower.*LanguageBind_Video_merge"),
        ({"mm_projector_type": "linear"}, UnsupportedModelError, "mm_projector_type='linear'"),
        ({"mm_vision_select_layer": None}, CheckpointError, "has no mm_vision_select_layer"),
    ],
)
def test_what_is_not_served_is_named(model, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        vzip.load_vlm(save_all(model, tmp_path, **changes))


def sampled(values, length, mode):
    """Resizing matrix written out: linear, or cubic with a = -0.75, corners not aligned, no antialiasing."""
    matrix = np.zeros((length, values))
    for row in range(length):
        centre = (row + 0.5) * values / length - 0.5
        if mode == "bilinear":
            centre = max(centre, 0.0)
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x, a = abs(centre - tap), -0.75
            if mode == "bilinear":
                weight = max(0.0, 1 - x)
            elif x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
            matrix[row, min(max(tap, 0), values - 1)] += weight
    return matrix


@pytest.mark.parametrize(("make", "mode"), [(image_pixels, "bicubic"), (frame_pixels, "bilinear")])
def test_pixels_are_the_authors_arithmetic(make, mode):
    processor = tiny.video_image_processor()
    values = np.random.default_rng(0).integers(0, 256, (250, 371, 3), dtype=np.uint8)
    found = make([Image.fromarray(values)], processor)[0].double().numpy()
    width = int(112 * 371 / 250)  # 166: the longer side is cut off, not rounded
    rows, cols = sampled(250, 112, mode), sampled(371, width, mode)
    resized = (rows @ (values / 255).transpose(2, 0, 1) @ cols.T)[:, :, 27 : 27 + 112]
    mean, std = (np.array(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    np.testing.assert_allclose(found, (resized - mean) / std, rtol=0, atol=1e-4)
    assert torch.equal(make([Image.fromarray(values)], processor), make([Image.fromarray(values)], processor))


def test_an_image_too_oblong_is_refused():
    with pytest.raises(ImageError, match="more oblong than 100:1"):
        image_pixels([Image.new("RGB", (1010, 10))], tiny.video_image_processor())
