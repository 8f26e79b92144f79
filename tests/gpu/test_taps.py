"""What is read from a tower beside its fused attention, against eager attention with all maps."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from tests import tiny
from tests.gpu.kit import each_device, each_half
from transformers import AutoModel

from vzip.compressors import Signal
from vzip.models.towers.structure import find_tower
from vzip.models.towers.tap import run_tower

BOTH = frozenset({Signal("attention"), Signal("keys")})
Kind = Literal["clip", "siglip"]
each_kind = pytest.mark.parametrize("kind", ["clip", "siglip"])


def tower_of(kind: Kind, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    tower = AutoModel.from_config(tiny.vision_config(kind), attn_implementation=attention).eval()
    tiny.sharpen(tower, kind)
    return tower


def eager_reading(kind: Kind, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, scores and keys of the second-last layer, in the pixels' type and on their device."""
    tower = tower_of(kind, "eager").to(pixels.device, pixels.dtype)
    output = tower(pixels, output_attentions=True, output_hidden_states=True)
    maps, block = output.attentions[2].float(), tower.encoder.layers[2]
    attention = maps[:, :, 0, 1:].sum(dim=1) if kind == "clip" else maps.mean(dim=(1, 2))
    keys = block.self_attn.k_proj(block.layer_norm1(output.hidden_states[2]))
    return {
        "hidden": output.hidden_states[-2].float(),
        "attention": attention,
        "keys": keys.float().unflatten(-1, (4, 8)).mean(dim=2),
    }


def our_reading(kind: Kind, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    vision = run_tower(find_tower(tower_of(kind).to(pixels.device, pixels.dtype)), pixels, -2, BOTH)
    assert vision.attention is not None and vision.keys is not None
    return {"hidden": vision.hidden.float(), "attention": vision.attention, "keys": vision.keys}


@each_device
@each_kind
@pytest.mark.usefixtures("no_tf32")
@torch.no_grad()
def test_float32_agrees_to_rounding(kind: Kind, device: str) -> None:
    pixels = tiny.pixels(3).to(device)
    ours, eager = our_reading(kind, pixels), eager_reading(kind, pixels)
    assert eager["attention"].std() > 1e-3
    for name, expected in eager.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@each_device
@each_half
@each_kind
@pytest.mark.usefixtures("no_tf32")
@torch.no_grad()
def test_half_precision_is_as_near_the_truth_as_eager_is(kind: Kind, dtype: torch.dtype, device: str) -> None:
    """Against float32 on the same device, at most three times eager attention's own error in the same type.

    An absolute tolerance would say nothing: peaked attention amplifies rounding, as much in one way as in the other.
    """
    pixels = tiny.pixels(3).to(device)
    truth = eager_reading(kind, pixels)
    ours, eager = our_reading(kind, pixels.to(dtype)), eager_reading(kind, pixels.to(dtype))
    assert ours["attention"].dtype == torch.float32  # scores are compared in float32 whatever the tower computes in
    for name, expected in truth.items():
        our_error, eager_error = (float((one[name] - expected).norm()) for one in (ours, eager))
        assert 0 < our_error <= 3 * eager_error, name


@each_device
@each_half
@each_kind
@torch.no_grad()
def test_taps_do_not_change_the_output(kind: Kind, dtype: torch.dtype, device: str) -> None:
    tower, pixels = tower_of(kind).to(device, dtype), tiny.pixels(2).to(device, dtype)
    stock = tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(run_tower(find_tower(tower), pixels, -2, BOTH).hidden, stock)
