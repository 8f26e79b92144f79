"""Nothing of Hugging Face is ever changed: not the model, not its classes, not another model in the process."""

from __future__ import annotations

import pytest
import torch
from tests import tiny
from tests.isolation.snapshot import changed, snapshot
from tests.tiny import IMAGE_TOKEN
from transformers import CLIPVisionModel

import vzip

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
IDS = torch.tensor([[5, 6, IMAGE_TOKEN, 7]])


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_model_is_unchanged_by_use(tower):
    model = tiny.llava(tower)
    before = snapshot(model)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    vlm.forward(IDS, pixel_values=tiny.pixels(1), labels=IDS).loss.detach()
    vlm.encode_images(tiny.pixels(2))
    vlm.generate(IDS, pixel_values=tiny.pixels(1), max_new_tokens=2)
    vlm.compressor = vzip.Identity()
    vlm.forward(IDS, pixel_values=tiny.pixels(1))
    assert vlm.model is model
    assert changed(before, snapshot(model)) == []


def test_the_snapshot_sees_changes():
    model = tiny.llava()
    before = snapshot(model)
    layer = model.model.vision_tower.encoder.layers[0]
    handle = layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    assert changed(before, snapshot(model)) == ["model.vision_tower.encoder.layers.0.self_attn.q_proj._forward_hooks"]
    handle.remove()
    assert changed(before, snapshot(model)) == []
    layer.forward = layer.forward
    assert changed(before, snapshot(model)) == ["model.vision_tower.encoder.layers.0.forward"]


@pytest.mark.parametrize("fails", [None, "prompt", "decoding", "pruner"])
def test_the_model_is_unchanged_by_a_pruner(fails, monkeypatch):
    """Also where a layer behind the cut fails, on the prompt or later, or the pruner itself."""
    model = tiny.llava(num_text_layers=4)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), pruner=vzip.FastV(2, 4))
    num_calls = 0

    def fail(*_):
        nonlocal num_calls
        num_calls += 1
        if fails == "pruner" or num_calls == {"prompt": 1, "decoding": 3}.get(fails):
            raise MemoryError("no room")

    if fails == "pruner":
        monkeypatch.setattr(vzip.FastV, "cut", fail)
    model.model.language_model.layers[3].mlp.register_forward_hook(fail)
    before = snapshot(model)
    if fails is None:
        vlm.forward(IDS, pixel_values=tiny.pixels(1))
        vlm.generate(IDS, pixel_values=tiny.pixels(1), max_new_tokens=4)
    else:
        with pytest.raises(MemoryError, match="no room"):
            vlm.generate(IDS, pixel_values=tiny.pixels(1), max_new_tokens=4)
    assert changed(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("where", "kind"),
    [(0, vzip.VisionZip), (2, vzip.VisionZip), (0, vzip.FlowCut), (1, vzip.FlowCut), (2, vzip.Resized)],
)
def test_the_model_is_unchanged_after_an_exception_in_the_tower(where, kind):
    """Layer 2 is the tapped one (of 4, select layer -2), so its hooks are there when it fails; FlowCut's: 0 and 1."""
    model = tiny.llava()
    vlm = vzip.CompressedVlm(model, kind(BUDGET))
    layer = model.model.vision_tower.encoder.layers[where]

    def fail(*_):
        raise MemoryError("no room")

    with_hook = layer.mlp.register_forward_hook(fail)
    before = snapshot(model)
    with pytest.raises(MemoryError, match="no room"):
        vlm.generate(IDS, pixel_values=tiny.pixels(1), max_new_tokens=2)
    assert changed(before, snapshot(model)) == []
    with_hook.remove()
    assert vlm.forward(IDS, pixel_values=tiny.pixels(1)).logits.shape == (1, 12, 64)


@torch.no_grad()
def test_taps_live_only_during_the_tower():
    model = tiny.llava()
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    layers = model.model.vision_tower.encoder.layers
    during, after = [], []

    def count():
        return [
            sum(len(getattr(layer.self_attn, name)._forward_hooks) for name in ("q_proj", "k_proj", "v_proj"))
            for layer in layers
        ]

    layers[1].register_forward_hook(lambda *_: during.append(count()))
    model.model.multi_modal_projector.register_forward_hook(lambda *_: after.append(count()))
    vlm.encode_images(tiny.pixels(1))
    assert during == [[0, 0, 2, 0]] and after == [[0, 0, 0, 0]]


@torch.no_grad()
def test_another_clip_in_the_process_is_unaffected():
    torch.manual_seed(5)
    config = tiny.vision_config("clip")
    config._attn_implementation = "eager"
    other = CLIPVisionModel(config).eval()
    pixels = tiny.pixels(1)
    before = other(pixels, output_attentions=True)
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET))
    vlm.generate(IDS, pixel_values=pixels, max_new_tokens=2)
    after = other(pixels, output_attentions=True)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(before.attentions, after.attentions, strict=True))


@torch.no_grad()
def test_two_wrappers_on_one_model_do_not_disturb_each_other():
    model = tiny.llava()
    budgets = [vzip.TokenBudget(6, 3), vzip.TokenBudget(20, 10)]
    pixels = tiny.pixels(1)
    alone = [
        vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(budget)).forward(IDS, pixel_values=pixels).logits
        for budget in budgets
    ]
    wrappers = [vzip.CompressedVlm(model, vzip.VisionZip(budget)) for budget in budgets]
    plain = vzip.CompressedVlm(model, vzip.Identity())
    for _ in range(2):
        for wrapper, expected, budget in zip(wrappers, alone, budgets, strict=True):
            assert torch.equal(wrapper.forward(IDS, pixel_values=pixels).logits, expected)
            assert wrapper.last_num_visual_tokens == [budget.num_tokens]
            plain.forward(IDS, pixel_values=pixels)
    assert plain.last_num_visual_tokens == [64]


@torch.no_grad()
def test_threads_sharing_a_model_get_their_own_images():
    from concurrent.futures import ThreadPoolExecutor

    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET))
    pictures = [tiny.pixels(1, seed) for seed in range(6)]
    with torch.no_grad():
        alone = [vlm.encode_images(picture)[0] for picture in pictures]

    def encode(picture):
        with torch.no_grad():
            return vlm.encode_images(picture)[0]

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(encode, pictures), strict=True))
