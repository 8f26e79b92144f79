"""Towers that images are given to: of every family what its own signals are made of; bare ones as they were saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scripts.make_random_model import FAMILIES, build
from tests.analysis.towers import save, tower
from tests.tiny import IMAGE_SIZE, vision_config
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipVisionModel

import vzip
from vzip.analysis import seeing
from vzip.analysis.attention import RECEIVED, each_layer
from vzip.compressors.vision import Signal
from vzip.errors import CheckpointError, ConfigError, UnsupportedModelError
from vzip.models.towers.structure import find_tower
from vzip.ops.grid import in_squares

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_of_any_family_sees(family: str) -> None:
    model, processor = build(family)
    vlm = vzip.CompressedVlm(model, vzip.Identity(), processor)
    if family.startswith("qwen"):
        with pytest.raises(UnsupportedModelError, match=f"model={family}: .* has no vision tower of the CLIP"):
            seeing.of_vlm(vlm, family)
        return
    seen = seeing.of_vlm(vlm, family)
    pixels, picture = seen.see(PICTURE)
    geometry = seen.tower.geometry
    rows, cols = geometry.grid
    assert picture.size == (cols * geometry.patch_size, rows * geometry.patch_size) and len(pixels) == 1
    (attention,) = each_layer(seen.tower, pixels, {seen.select_layer})
    ours = attention.maps()[RECEIVED]
    signal = Signal("received_attention")
    with torch.no_grad():
        visual = vlm.adapter.read_inputs(**vlm.preprocess_images([PICTURE]))
        ((_, vision),) = vlm.adapter.image_outputs(visual, frozenset({signal}))
    theirs = vision.read_patches(signal)[vlm.adapter.overview_index(visual.images[0])][None]
    ours = in_squares(ours, geometry.grid, geometry.unit_side).mean(dim=-1)
    torch.testing.assert_close(ours / ours.sum(), theirs / theirs.sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_bare_tower_is_the_saved_one(kind, whole, tmp_path, capfd) -> None:
    vision = tower(kind)
    folder = save(vision, tmp_path / "bare")
    if whole:  # beside a text model
        config_class, model_class = (CLIPConfig, CLIPModel) if kind == "clip" else (SiglipConfig, SiglipModel)
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
        model = model_class(config_class(vision_config=vision.config.to_dict(), text_config=text))
        model.vision_model.load_state_dict(vision.state_dict())
        model.save_pretrained(folder)
    seen = seeing.load_bare(seeing.check_bare(str(folder)))
    assert seen.select_layer == 3 and seen.name == "bare"
    assert "UNEXPECTED" not in capfd.readouterr().err
    pixels, picture = seen.see(PICTURE)
    assert np.asarray(picture)[5, 60] == pytest.approx([int(255 * m) for m in seen.image_processor.image_mean], abs=1)
    with torch.no_grad():
        hidden = vision(pixels, output_hidden_states=True).hidden_states[2]
        (attention,) = each_layer(seen.tower, pixels, {3})
        own = vision.get_submodule("encoder.layers")[2]
        torch.testing.assert_close(attention.keys, own.self_attn.k_proj(own.layer_norm1(hidden)))


def test_what_is_no_tower_is_refused(tmp_path) -> None:
    model, _ = build("llava")
    model.save_pretrained(tmp_path / "llava")
    with pytest.raises(ConfigError, match=r"of type llava.*model=llava_local model\.name_or_path="):
        seeing.check_bare(str(tmp_path / "llava"))
    with pytest.raises(CheckpointError, match="holds no config"):
        (tmp_path / "empty").mkdir()
        seeing.check_bare(str(tmp_path / "empty"))
    folder = save(tower("clip"), tmp_path / "clip")
    seen = seeing.load_bare(folder)
    assert seen.with_layer(-1).select_layer == 4 and seen.with_layer(None) == seen
    for layer in (0, 5, -6):
        with pytest.raises(ConfigError, match=rf"--layer {layer}: .* layers 1 to 4"):
            seen.with_layer(layer)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        seeing.load_bare(folder)


def test_an_edge_that_no_patch_covers_is_not_shown() -> None:
    """As of SigLIP at 384: 27 patches of 14 pixels, and six pixels that a click or a map would be shifted by."""
    config = SiglipVisionModel(vision_config("siglip")).config
    config.image_size = IMAGE_SIZE + 5
    found = find_tower(SiglipVisionModel(config).eval())
    assert found.geometry.grid == (8, 8)
    processor = SiglipImageProcessor(size={"height": config.image_size, "width": config.image_size})

    def prepare(image: Image.Image) -> torch.Tensor:
        return processor(image, return_tensors="pt")["pixel_values"]

    pixels, picture = seeing.SeeingTower("siglip", found, 3, prepare, processor, "select layer").see(PICTURE)
    assert pixels.shape[-1] == IMAGE_SIZE + 5 and picture.size == (IMAGE_SIZE, IMAGE_SIZE)
    whole = seeing.seen_image(pixels[0], processor)
    assert (np.asarray(picture) == np.asarray(whole)[:IMAGE_SIZE, :IMAGE_SIZE]).all()
