"""Overlays through a wrapper: what is drawn as kept and merged is what the compressor did, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scripts.make_random_model import FAMILIES, build

import vzip
from vzip.analysis.kept import draw_kept, kept_crop, kept_sheets

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
BUDGET = vzip.TokenBudget(5, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_is_what_the_compressor_did(family: str) -> None:
    model, processor = build(family)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor)
    sheets, tokens = kept_sheets(vlm, PICTURE)
    inputs = vlm.preprocess_images([PICTURE])
    with torch.no_grad():
        visual = vlm.adapter.read_inputs(**inputs)
        ((_, vision),) = vlm.adapter.image_outputs(visual, vlm.compressor.reads())
        made = vlm.compressor(vision)
    (shape,) = visual.images
    first, (rows, cols) = int(vision.has_cls), vision.grid
    # Crops in the order of the tower's batch: the one that shows the whole has a sheet of its own.
    whole, others = vlm.adapter.overview_index(shape), [n for n in range(shape.num_crops)]
    order = [whole, *(n for n in others if n != whole)]
    crops = [crop for sheet in sheets for crop in sheet.crops]
    assert len(crops) == len(order) == shape.num_crops
    for number, crop in zip(order, crops, strict=True):
        kept = {int(unit) - first for unit in made.source_index[number] if unit >= first}
        assert set(np.flatnonzero(crop.kept).tolist()) == kept
        slots = made.merge_index[number, first:].reshape(rows, cols).numpy()
        assert np.array_equal(crop.group, slots), "groups in the order of the tokens"
        assert list(crop.targets) == (made.place_index[number, len(made.source_index[0]) :] - first).tolist()
        assert all(crop.group.flatten()[target] == group for group, target in enumerate(crop.targets))
        assert (crop.image.width % cols, crop.image.height % rows) == (0, 0)
    of_each = f" in each of {shape.num_crops} crops" if shape.num_crops > 1 else ""
    assert tokens.startswith(
        f"{vlm.compressor.num_visual_tokens(shape)} of {shape.num_vanilla} visual tokens: 5 dominant"
    )
    assert f"+ 2 contextual{of_each}" in tokens


def test_the_image_is_what_the_tower_sees_and_tiles_lie_as_they_were_cut() -> None:
    model, processor = build("llava_next")
    side = model.config.vision_config.image_size
    wide = Image.new("RGB", (2 * side, side), "red")
    wide.paste((0, 0, 255), (side, 0, 2 * side, side))
    whole, tiles = kept_sheets(vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor), wide)[0]
    assert (whole.name, tiles.name) == ("whole image", f"{len(tiles.crops)} tiles")
    middle = [tuple(np.asarray(crop.image)[side // 2, side // 2].tolist()) for crop in tiles.crops[: tiles.num_columns]]
    assert tiles.num_columns > 1 and [max(range(3), key=rgb.__getitem__) for rgb in (middle[0], middle[-1])] == [0, 2]


@pytest.mark.parametrize("family", ["video_llava", "llava_onevision", "qwen2_5_vl"])
def test_the_frames_of_a_video(family: str) -> None:
    model, processor = build(family)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor)
    shades = [30 * n for n in range(8)]
    (sheet,), tokens = kept_sheets(vlm, [Image.new("RGB", (64, 64), (shade,) * 3) for shade in shades])
    means = [float(np.asarray(crop.image).mean()) for crop in sheet.crops]
    assert len(means) == (4 if family.startswith("qwen") else 8) and sheet.name == f"{len(means)} frames"
    every = shades[:: 8 // len(means)]
    assert means == pytest.approx(every, abs=2), "in their order; of two in a step the first"
    assert f"5 dominant + 2 contextual in each of {len(means)} frames" in tokens
    assert all(crop.kept.sum() in (4, 5) for crop in sheet.crops)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_method_of_the_whole_image_is_placed_too(family: str) -> None:
    """DivPrune chooses among the packed rows; where it merges what it drops, targets are kept patches."""
    model, processor = build(family)
    vlm = vzip.CompressedVlm(model, vzip.DivPrune(vzip.TokenBudget(7, 0)), processor)
    sheets, tokens = kept_sheets(vlm, PICTURE)
    crops = [crop for sheet in sheets for crop in sheet.crops]
    assert 0 < sum(crop.kept.sum() for crop in crops) <= 7 * len(crops) and not any(crop.targets for crop in crops)
    assert tokens.startswith(f"{7 * len(crops)} of") and "dominant" not in tokens
    vlm.compressor = vzip.MergeDropped(vlm.compressor)
    merged = [crop for sheet in kept_sheets(vlm, PICTURE)[0] for crop in sheet.crops]
    for before, crop in zip(crops, merged, strict=True):
        assert np.array_equal(before.kept, crop.kept)
        inside = [target for target in crop.targets if target >= 0]
        assert all(crop.kept.flatten()[target] for target in inside)
    assert any((crop.group >= 0).any() for crop in merged)


def test_all_is_kept_without_compression_and_words_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from vzip.analysis import kept

    said = []
    monkeypatch.setattr(kept, "draw_overlay", lambda sheets, words: said.append(words) or None)
    monkeypatch.setattr(kept, "as_image", lambda figure: None)
    model, processor = build("llava")
    vlm = vzip.CompressedVlm(model, vzip.Identity(), processor)
    (sheet,), _ = kept_sheets(vlm, PICTURE)
    assert sheet.crops[0].kept.all() and not sheet.crops[0].targets
    draw_kept(vlm, PICTURE, "what?", answer="this")
    vlm.pruner = vzip.FastV(K=1, keep=3)
    draw_kept(vlm, PICTURE, title="mine")
    assert [(w.title, w.question, w.answer) for w in said] == [("Identity", "what?", "this"), ("mine", "", "")]
    assert not said[0].notes and said[1].notes == ["FastV drops more inside the language model, which is not drawn."]


def test_dropped_patches_join_kept_ones() -> None:
    model, processor = build("llava")
    compressor = vzip.MergeDropped(vzip.DivPrune(vzip.TokenBudget(4, 0)))
    found = kept_crop(vzip.CompressedVlm(model, compressor, processor), PICTURE)
    kept, group = found.kept.flatten(), found.group.flatten()
    assert (group[~kept] >= 0).all(), "every patch is kept or joins one"
    assert set(np.flatnonzero(kept & (group >= 0))) == set(found.targets)
    assert all(kept[target] for target in found.targets) and len(set(found.targets)) == len(found.targets)


def test_of_a_method_of_the_whole_image_all_patches_are_there() -> None:
    model, processor = build("llava_next")
    vlm = vzip.CompressedVlm(model, vzip.Identity(), processor)
    found = kept_crop(vlm, PICTURE)
    assert found.image.tobytes() == kept_sheets(vlm, PICTURE)[0][0].crops[0].image.tobytes()
    assert found.kept.all() and not found.targets
