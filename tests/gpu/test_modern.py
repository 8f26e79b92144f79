"""Qwen's families, and methods that act inside the tower, resize or ask: on a device as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import methods, tiny, tiny_qwen, tiny_qwen3
from tests.gpu.kit import BUDGET, each_device, each_half, on
from torch.utils._python_dispatch import TorchDispatchMode

import vzip

QWEN = {"qwen2_5_vl": tiny_qwen.build, "qwen3_vl": tiny_qwen3.build}
SHOWN = [tiny_qwen.prompt(5, "6x10", 7, "4x8", 8), tiny_qwen.prompt(9, "8x8", 3)]
GRIDS = ("6x10", "4x8", "8x8")
IN_TOWER = ("flowcut", "resized", "mmtok")
each_qwen = pytest.mark.parametrize("build", QWEN.values(), ids=QWEN)


class Asked(TorchDispatchMode):
    """Counts the numbers that the host asks of tensors and so waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@each_device
@each_half
@each_qwen
@torch.no_grad()
def test_identity_equals_stock_bit_for_bit(build: Any, dtype: torch.dtype, device: str) -> None:
    model = build().to(device, dtype)
    inputs, ids = on(device, tiny_qwen.images(*GRIDS), dtype), on(device, tiny_qwen.batch(*SHOWN))
    theirs = model(**tiny_qwen.stock(model, ids, **inputs)).logits
    model.model.rope_deltas = None  # what stock leaves behind
    ours = vzip.CompressedVlm(model, vzip.Identity()).forward(**ids, **inputs).logits
    valid = ids["attention_mask"].bool()
    assert ours.device.type == device and torch.equal(ours[valid], theirs[valid])


@each_device
@each_qwen
@pytest.mark.usefixtures("no_tf32")
@torch.no_grad()
def test_qwen_gives_what_it_gives_on_the_cpu(build: Any, device: str) -> None:
    """Positions are equal only where the same tokens are kept; a video's planes and times are among them."""
    in_runs = build is tiny_qwen3.build
    film = {"rows": [[5, *tiny_qwen.video("3x6x10", in_runs), 7]], "given": tiny_qwen.videos("3x6x10")}
    for case in ({"rows": SHOWN, "given": tiny_qwen.images(*GRIDS)}, film):
        prepared, logits = {}, {}
        for place in ("cpu", device):
            vlm = vzip.CompressedVlm(build().to(place), vzip.VisionZip(BUDGET))
            inputs = on(place, {**tiny_qwen.batch(*case["rows"]), **case["given"]})
            prepared[place], logits[place] = vlm.prepare(**inputs), vlm.forward(**inputs).logits.cpu()
        assert prepared[device].num_visual_tokens == prepared["cpu"].num_visual_tokens
        assert torch.equal(prepared[device].position_ids.cpu(), prepared["cpu"].position_ids)
        torch.testing.assert_close(logits[device], logits["cpu"], atol=2e-3, rtol=2e-3)


@each_device
@pytest.mark.parametrize("name", IN_TOWER)
@pytest.mark.usefixtures("no_tf32")
@torch.no_grad()
def test_methods_choose_what_they_choose_on_the_cpu(name: str, device: str) -> None:
    made = {}
    for place in ("cpu", device):
        vlm = vzip.CompressedVlm(tiny.llava().to(place), methods.build(name, vzip.TokenBudget(4, 0)))
        visual = vlm.adapter.read_inputs(**on(place, {"pixel_values": tiny.pixels(2)}))
        if vlm.compressor.reads_text:
            rows = vlm.adapter.embed_tokens(torch.tensor([5, 6, 7], device=place))
            visual = type(visual)(visual.images, visual.videos, visual.tensors, (rows, rows))
        with Asked() as asked:
            made[place] = [one.rows.cpu() for one in vlm.adapter.encode(visual, vlm.compressor)]
        assert [len(rows) for rows in made[place]] == [4, 4]
        assert asked.count == 0, "a fixed count waits for nothing"
    for there, here in zip(made[device], made["cpu"], strict=True):
        torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)
