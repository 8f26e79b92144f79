"""Images and videos encoded beforehand are what ``prepare`` and ``generate`` make of them, in however many prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny_qwen, tiny_qwen3
from tests.families import FAMILIES

import vzip
from vzip.errors import PromptError
from vzip.models.families.places import EncodedVisuals

COMPRESSORS = (vzip.VisionZip(vzip.TokenBudget(4, 2)), vzip.Identity())
FIELDS = ("inputs_embeds", "attention_mask", "position_ids", "visual_index", "num_visual_tokens")


def assert_same(one: Any, other: Any) -> None:
    for name in FIELDS:
        ours, theirs = getattr(one, name), getattr(other, name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, name
    assert (one.planes is None) == (other.planes is None)
    assert one.planes is None or torch.equal(one.planes, other.planes)


def shown_again(encoded: EncodedVisuals, *order: int) -> EncodedVisuals:
    return EncodedVisuals(
        [encoded.images[number] for number in order if encoded.images],
        [encoded.videos[number] for number in order if encoded.videos],
    )


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=("visionzip", "none"))
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_is_the_same_bit_for_bit(family: Any, compressor: vzip.Compressor) -> None:
    vlm = vzip.CompressedVlm(family.build(), compressor)
    inputs = family.inputs(2)
    ids = torch.tensor([[11, family.token, 12, 13], [11, family.token, 14, 15]])
    with torch.no_grad():
        encoded = vlm.encode(**inputs)
        assert_same(vlm.prepare(ids, encoded=encoded), vlm.prepare(ids, **inputs))
        assert vlm.expected_num_visual_tokens(encoded=encoded) == vlm.last_num_visual_tokens
        both = vlm.generate(ids, max_new_tokens=3, do_sample=False, **inputs)
        again = vlm.generate(ids[[0, 1, 0]], encoded=shown_again(encoded, 0, 1, 0), max_new_tokens=3, do_sample=False)
    assert torch.equal(again[:2], both) and torch.equal(again[2], both[0])
    assert sum(vlm.visual_bytes(**inputs)) == sum(own.rows.nbytes for _, own in (*encoded.images, *encoded.videos))
    assert encoded.num_bytes >= sum(own.rows.nbytes for _, own in (*encoded.images, *encoded.videos)) > 0


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=("visionzip", "none"))
@pytest.mark.parametrize("kit", [tiny_qwen, tiny_qwen3], ids=["qwen2_5_vl", "qwen3_vl"])
def test_with_places_planes_and_videos(kit: Any, compressor: vzip.Compressor) -> None:
    vlm, in_runs = vzip.CompressedVlm(kit.build(), compressor), kit is tiny_qwen3
    inputs = tiny_qwen.images("6x10", "8x8") | tiny_qwen.videos("2x6x10")
    rows = [
        tiny_qwen.prompt(5, "6x10", 6, "8x8", 7),
        [5, *tiny_qwen.video("2x6x10", in_runs), 9],
        tiny_qwen.prompt(3, "8x8", 4),
    ]
    ids = tiny_qwen.batch(*rows[:2])
    with torch.no_grad():
        encoded = vlm.encode(**inputs)
        assert_same(vlm.prepare(**ids, encoded=encoded), vlm.prepare(**ids, **inputs))
        more = EncodedVisuals([*encoded.images, encoded.images[1]], encoded.videos)
        together = vlm.prepare(**tiny_qwen.batch(*rows), encoded=more)
        alone = vlm.prepare(**tiny_qwen.batch(rows[2]), encoded=EncodedVisuals([encoded.images[1]]))
        length = alone.inputs_embeds.shape[1]
        assert torch.equal(together.inputs_embeds[2, -length:], alone.inputs_embeds[0])
        assert torch.equal(together.position_ids[..., 2, -length:], alone.position_ids[..., 0, :])
        answers = vlm.generate(**ids, **inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(vlm.generate(**ids, encoded=encoded, max_new_tokens=3, do_sample=False), answers)


def test_a_pruner_finds_them_in_each_prompt() -> None:
    family = FAMILIES[0]
    vlm = vzip.CompressedVlm(family.build(), vzip.Identity(), pruner=vzip.FastV(1, 3))
    inputs, ids = family.inputs(1), torch.tensor([[11, family.token, 12, 13], [11, family.token, 14, 15]])
    with torch.no_grad():
        encoded = shown_again(vlm.encode(**inputs), 0, 0)
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        answers = vlm.generate(ids, encoded=encoded, max_new_tokens=3, do_sample=False)
        schedule = vlm.last_pruned.visual_schedule  # type: ignore[union-attr]
        assert torch.equal(answers, vlm.generate(ids, max_new_tokens=3, do_sample=False, **twice))
    assert schedule == vlm.last_pruned.visual_schedule and len(schedule) == 2  # type: ignore[union-attr]


def test_of_another_budget_or_beside_pixels_they_are_refused() -> None:
    family = FAMILIES[0]
    vlm = vzip.CompressedVlm(family.build(), COMPRESSORS[0])
    inputs, ids = family.inputs(1), torch.tensor([[11, family.token, 12]])
    encoded = vlm.encode(**inputs)
    with pytest.raises(PromptError, match="pixel_values beside encoded"):
        vlm.prepare(ids, encoded=encoded, **inputs)
    with pytest.raises(PromptError, match=r"2 <image>|1 image"):
        vlm.prepare(torch.tensor([[11, family.token, 12, family.token, 13]]), encoded=encoded)
    vlm.compressor = vzip.VisionZip(vzip.TokenBudget(3, 2))
    with pytest.raises(PromptError, match=r"6 visual tokens, and VisionZip\(.* makes 5 of it"):
        vlm.generate(ids, encoded=encoded, max_new_tokens=1)
