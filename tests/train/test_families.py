"""Every family's projector is tuned, comes back, and is merged into a checkpoint that stock Hugging Face loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests import tiny, tiny_mini_gemini
from tests.train.kit import BUDGET

import vzip
from vzip.models.tuned import read_tensors
from vzip.train.loop import train
from vzip.train.merge import merge

# Model and processor; crops of a picture of 60 x 40 pixels.
FAMILIES = {
    "llava_next": (tiny.llava_next, tiny.next_processor, 3),
    "video_llava": (lambda **size: tiny.video_llava(video_token=5, **size), tiny.video_processor, 1),
    "mini_gemini": (tiny_mini_gemini.mini_gemini, tiny_mini_gemini.processor, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projector_is_tuned_used_and_merged(family: str, plan: Any, tmp_path: Path) -> None:
    build, build_processor, num_crops = FAMILIES[family]
    processor = build_processor()
    stock = build(vocab_size=len(processor.tokenizer))
    base = tmp_path / "base"
    stock.save_pretrained(base)
    processor.save_pretrained(base)
    compressor = vzip.VisionZip(BUDGET)
    loaded: list[vzip.CompressedVlm] = []

    def load(precision: str) -> vzip.CompressedVlm:
        loaded.append(vzip.load_vlm(base, dtype=precision, compressor=compressor))
        return loaded[-1]

    final = train(plan(load_model=load, name_or_path=str(base), num_steps=2))

    before, after = stock.state_dict(), loaded[0].model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name} == set(read_tensors(final))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pictures = [row["num_visual_tokens"] / (BUDGET.num_tokens * num_crops) for row in rows]
    assert all(count == int(count) > 0 for count in pictures)

    inputs = loaded[0].preprocess_images([Image.new("RGB", (60, 40), "green")])
    tuned = vzip.load_vlm(base, projector=final, compressor=compressor).encode_images(**inputs)[0]
    assert tuned.shape[0] == num_crops * BUDGET.num_tokens
    assert torch.equal(tuned, loaded[0].eval().encode_images(**inputs)[0])
    merge(final, tmp_path / "merged")
    merged = type(stock).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in after.items())
