"""What is read from the tower equals what eager attention shows, and nothing more runs than is needed."""

from __future__ import annotations

import pytest
import torch
from tests import tiny, tiny_internvl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from vzip.compressors.vision import SCORES, SIGNALS, Signal
from vzip.errors import PromptError, UnsupportedModelError
from vzip.models.families.video_llava.tower import CLIP_FRAMES, LanguageBindVideoTower
from vzip.models.towers.structure import check_select_layer, find_tower, geometry_from_config
from vzip.models.towers.tap import record_output, run_tower

BOTH = frozenset({Signal("attention"), Signal("keys")})


def tower_of(kind, num_layers=4, attention="sdpa"):
    torch.manual_seed(0)
    tower = AutoModel.from_config(tiny.vision_config(kind, num_layers), attn_implementation=attention).eval()
    tiny.sharpen(tower, kind)
    return tower


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("select_layer", [-2, -1, 1, 2, -4])
@torch.no_grad()
def test_attention_and_hidden_equal_eager(kind, select_layer):
    sdpa, eager = tower_of(kind).double(), tower_of(kind, attention="eager").double()
    eager.load_state_dict(sdpa.state_dict())
    pixels = tiny.pixels(3).double()  # float64: the two kernels round differently, and peaked attention amplifies it
    vision = run_tower(find_tower(sdpa), pixels, select_layer, BOTH)
    stock = eager(pixels, output_attentions=True, output_hidden_states=True)
    layer = select_layer - 1 if select_layer > 0 else 4 + select_layer
    maps = stock.attentions[layer]
    expected = maps[:, :, 0, 1:].sum(dim=1) if kind == "clip" else maps.mean(dim=(1, 2))
    # Eager rounds its softmax to float32; ours stays in float64.
    torch.testing.assert_close(vision.attention, expected, rtol=0, atol=2e-6)
    assert vision.attention.std() > 1e-3  # peaked: the comparison is not of a constant
    torch.testing.assert_close(vision.hidden, stock.hidden_states[select_layer], rtol=0, atol=1e-5)
    block = eager.encoder.layers[layer]
    keys = block.self_attn.k_proj(block.layer_norm1(stock.hidden_states[layer])).view(3, -1, 4, 8).mean(dim=2)
    torch.testing.assert_close(vision.keys, keys, rtol=0, atol=1e-5)
    assert (vision.has_cls, vision.grid, vision.num_patches) == (kind == "clip", (8, 8), 64)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("score_layer", [None, -1, 1, 3])
@torch.no_grad()
def test_every_score_of_any_layer_equals_eager_beside_the_select_layers_output(kind, score_layer):
    sdpa, eager = tower_of(kind).double(), tower_of(kind, attention="eager").double()
    eager.load_state_dict(sdpa.state_dict())
    pixels = tiny.pixels(2).double()
    vision = run_tower(
        find_tower(sdpa),
        pixels,
        -2,
        [Signal(name, score_layer) for name in SIGNALS if name not in ("projected", "text")],
    )
    stock = eager(pixels, output_attentions=True, output_hidden_states=True)
    layer = {None: 2, -1: 3}.get(score_layer, (score_layer or 0) - 1)
    maps, first = stock.attentions[layer], int(kind == "clip")
    received = maps.mean(dim=(1, 2))[:, first:]
    read = {name: vision.read_patches(Signal(name, score_layer)) for name in (*SCORES, "keys")}
    torch.testing.assert_close(read["received_attention"], received, rtol=0, atol=2e-6)
    expected = maps[:, :, 0, 1:].sum(dim=1) if first else received
    torch.testing.assert_close(read["attention"], expected, rtol=0, atol=2e-6)
    block = eager.encoder.layers[layer]
    keys = block.self_attn.k_proj(block.layer_norm1(stock.hidden_states[layer])).view(2, -1, 4, 8)
    torch.testing.assert_close(read["keys"], keys.mean(dim=2)[:, first:], rtol=0, atol=1e-5)
    torch.testing.assert_close(read["key_norms"], keys.norm(dim=-1).mean(dim=2)[:, first:], rtol=0, atol=1e-5)
    keys = keys.flatten(2)
    torch.testing.assert_close(vision.read(Signal("undivided_keys", score_layer)), keys, rtol=0, atol=1e-5)
    queries = block.self_attn.q_proj(block.layer_norm1(stock.hidden_states[layer]))
    undivided = torch.softmax(queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5, dim=-1)
    expected = undivided[:, 0, 1:] if first else undivided.mean(dim=1)
    torch.testing.assert_close(read["undivided_attention"], expected, rtol=0, atol=2e-6)
    of_layer = vision.read(Signal("hidden", score_layer))
    torch.testing.assert_close(
        of_layer, stock.hidden_states[-2 if score_layer is None else score_layer], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(vision.hidden, stock.hidden_states[-2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_taps_do_not_change_the_output(kind):
    tower = tower_of(kind)
    pixels = tiny.pixels(2)
    stock = tower(pixels, output_hidden_states=True).hidden_states
    for select_layer in (-2, -1, 0, 2):
        assert torch.equal(run_tower(find_tower(tower), pixels, select_layer).hidden, stock[select_layer])
        if select_layer:
            assert torch.equal(run_tower(find_tower(tower), pixels, select_layer, BOTH).hidden, stock[select_layer])


@pytest.mark.parametrize("kind", ["clip", "siglip", "internvl", "languagebind"])
@torch.no_grad()
def test_projections_made_apart_are_the_layers_own(kind):
    """What a graph reads in place of the hooks."""
    torch.manual_seed(0)
    if kind == "internvl":
        module = tiny_internvl.build(use_qk_norm=True).model.vision_tower
    elif kind == "languagebind":
        module = LanguageBindVideoTower(tiny.vision_config("clip")).eval()
    else:
        module = tower_of(kind)
    tower, found = find_tower(module), {}
    queries, keys, _ = tower.attention_of(1)
    hidden = tower.run_layer(0, tower.embed(tiny.pixels(CLIP_FRAMES)))
    with record_output(queries, "queries", found), record_output(keys, "keys", found):
        tower.run_layer(1, hidden)
    own_keys, own_queries = tower.projections(1, hidden, with_queries=True)
    assert torch.equal(own_keys, found["keys"]) and torch.equal(own_queries, found["queries"])
    assert tower.projections(1, hidden, with_queries=False)[1] is None


@pytest.mark.parametrize(("select_layer", "runs"), [(-2, [1, 1, 1, 0]), (-1, [1, 1, 1, 1]), (1, [1, 0, 0, 0])])
@torch.no_grad()
def test_layers_after_the_select_layer_do_not_run(select_layer, runs):
    tower = tower_of("clip")
    calls = [0] * 4
    for index, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    post = []
    tower.post_layernorm.register_forward_hook(lambda *_: post.append(1))
    run_tower(find_tower(tower), tiny.pixels(1), select_layer, BOTH)
    assert calls == runs and post == []


class Watch(TorchDispatchMode):
    """Shapes of everything computed."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple) else (result,):
            if isinstance(item, torch.Tensor):
                self.shapes.add(tuple(item.shape))
        return result


class CountSdpa(TorchFunctionMode):
    """Calls of the fused attention."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num_calls += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_sdpa_stays_on_and_no_attention_map_exists(kind):
    tower = tower_of(kind)
    length = 64 + (kind == "clip")
    with CountSdpa() as sdpa, Watch() as watch:
        run_tower(find_tower(tower), tiny.pixels(2), -2, BOTH)
    assert sdpa.num_calls == 3
    assert not any(shape[-2:] == (length, length) for shape in watch.shapes)
    eager = tower_of(kind, attention="eager")
    with Watch() as watch:  # the check sees maps where there are some
        eager(tiny.pixels(2))
    assert any(shape[-2:] == (length, length) for shape in watch.shapes)


@torch.no_grad()
def test_only_what_is_required_is_read():
    tower = find_tower(tower_of("clip"))
    keys_only = run_tower(tower, tiny.pixels(1), -2, frozenset({Signal("keys")}))
    assert keys_only.attention is None and keys_only.keys is not None
    nothing = run_tower(tower, tiny.pixels(1), -2)
    assert nothing.attention is None and nothing.keys is None


def test_gradients_flow_and_none_is_forced():
    tower = find_tower(tower_of("clip"))
    pixels = tiny.pixels(1).requires_grad_()
    run_tower(tower, pixels, -2, BOTH).hidden.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_the_older_layout_with_vision_model_inside():
    tower = tower_of("clip")

    class Older(type(tower)):
        """As transformers 4 nested it."""

        def __init__(self, inner):
            torch.nn.Module.__init__(self)
            self.config = inner.config
            self.vision_model = inner

    with torch.no_grad():
        new = run_tower(find_tower(tower), tiny.pixels(1), -2, BOTH)
        old = run_tower(find_tower(Older(tower)), tiny.pixels(1), -2, BOTH)
    assert torch.equal(new.hidden, old.hidden) and torch.equal(new.attention, old.attention)


def test_what_cannot_be_served_is_named():
    tower = find_tower(tower_of("clip"))
    with pytest.raises(PromptError, match=r"\(1, 3, 28, 28\).*112, 112"):
        run_tower(tower, torch.zeros(1, 3, 28, 28), -2)
    for select_layer in (-6, 5):
        with pytest.raises(UnsupportedModelError, match=f"vision_feature_layer={select_layer}.*-5 to 4"):
            run_tower(tower, tiny.pixels(1), select_layer)
    with pytest.raises(UnsupportedModelError, match="no attention"):
        run_tower(tower, tiny.pixels(1), 0, BOTH)
    with pytest.raises(UnsupportedModelError, match="Linear is not supported"):
        find_tower(torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedModelError, match=r"\[-2, -3\].*several layers"):
        check_select_layer([-2, -3])
    config = tiny.vision_config("clip")
    config.model_type = "dinov2"
    with pytest.raises(UnsupportedModelError, match="'dinov2' is not supported"):
        geometry_from_config(config)
