"""A tiny Qwen2.5-VL: the one whose outputs are in ``tests/golden/qwen2_5_vl_tiny``, and prompts for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden/qwen2_5_vl_tiny"
IMAGE, VIDEO, START, END = 120, 121, 122, 123
GRIDS = ("4x4", "4x8", "6x10", "8x8", "12x16", "14x22")  # rows x columns of patches; a merge unit is 2 x 2


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    """``inputs`` or ``expected_w2``."""
    return load_file(GOLDEN / f"{name}.safetensors")


def build() -> Any:
    """The model, float32, as ``from_pretrained`` loads it."""
    with TemporaryDirectory() as folder:
        weights = {name: value.float() for name, value in load_file(GOLDEN / "weights_w2.safetensors").items()}
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        Path(folder, "config.json").write_text((GOLDEN / "config_w2.json").read_text())
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def images(*grids: str) -> dict[str, torch.Tensor]:
    """What the processor returns for images of these grids."""
    pixels = [golden("inputs")[f"{grid}.pixel_values"].float() for grid in grids]
    sizes = [golden("inputs")[f"{grid}.grid_thw"].long() for grid in grids]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(sizes)}


def num_units(grid: str) -> int:
    rows, cols = map(int, grid.split("x"))
    return rows * cols // 4


def prompt(*items: int | str, expanded: bool = True) -> list[int]:
    """Ids: whole numbers are text, a grid stands for an image of that size."""
    ids: list[int] = []
    for item in items:
        ids += [START, *[IMAGE] * (num_units(item) if expanded else 1), END] if isinstance(item, str) else [item]
    return ids


def videos(*grids: str) -> dict[str, torch.Tensor]:
    """What the processor returns for videos of these grids, as ``3x6x10``: steps first."""
    sizes = [tuple(map(int, grid.split("x"))) for grid in grids]
    generator = torch.Generator().manual_seed(sum(sum(size) for size in sizes))
    num_patches = sum(steps * rows * cols for steps, rows, cols in sizes)
    return {
        "pixel_values_videos": torch.randn(num_patches, 96, generator=generator),
        "video_grid_thw": torch.tensor(sizes),
    }


def video(grid: str, in_runs: bool) -> list[int]:
    """Ids of a video: one run of placeholders, or (Qwen3-VL) a run a step with its time, two words, before it."""
    steps, rows, cols = map(int, grid.split("x"))
    length = rows * cols // 4
    if not in_runs:
        return [START, *[VIDEO] * steps * length, END]
    return [i for step in range(steps) for i in (40 + step, 39, START, *[VIDEO] * length, END)]


def batch(*rows: list[int], side: str = "left") -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, padded."""
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    ids = [[*pad, *row] if side == "left" else [*row, *pad] for pad, row in zip(fill, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[*pad, *one] if side == "left" else [*one, *pad] for pad, one in zip(fill, ones, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def stock(model: Any, ids: dict[str, torch.Tensor], **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of the unmodified model."""
    shown = ids["input_ids"]
    return {**ids, **inputs, "mm_token_type_ids": (shown == IMAGE).int() + 2 * (shown == VIDEO).int()}


def recorded_maps(tower: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
    """The attention maps of one run of a tower, in float64: of each block, one ``[1, heads, L, L]`` a segment."""
    maps = []

    def recording(module, query, key, value, attention_mask, scaling, **_kwargs):
        weights = (query.double() @ key.double().transpose(-1, -2) * scaling).softmax(-1)
        maps.append(weights)
        return (weights @ value.double()).to(query.dtype).transpose(1, 2), None

    AttentionInterface.register("recording_for_a_test", recording)
    usual = tower.config._attn_implementation
    tower.config._attn_implementation = "recording_for_a_test"
    try:
        tower(pixel_values, grid_thw=grid_thw)
    finally:
        tower.config._attn_implementation = usual
    return maps
