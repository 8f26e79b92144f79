"""Towers that run by a method's plan: FlowCut against its own code, loops and by hand; the resized image."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests import methods, tiny, tiny_mini_gemini, tiny_qwen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

import vzip
from vzip.compressors.flowcut import FlowPruner
from vzip.compressors.plan import LayerState, TowerPlan
from vzip.compressors.vision import Signal
from vzip.errors import ConfigError, UnsupportedModelError
from vzip.models.families.options import FamilyOptions
from vzip.models.towers.cache import TowerCache
from vzip.models.towers.planned import run_planned
from vzip.models.towers.structure import find_tower
from vzip.ops.grid import middle_places

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rivals"
CASES = [("p49_s0", 12), ("p576_s0", 192), ("p576_s0", 64), ("p576_s0", 32)]


def budget(num_tokens):
    return vzip.TokenBudget(num_tokens, 0)


class Embeddings(torch.nn.Module):
    """Stands for a tower's embeddings: what enters the first layer is given, one picture a crop."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.nn.Parameter(rows, requires_grad=False)

    def forward(self, pixel_values):
        return self.rows[pixel_values[:, 0, 0, 0].long()]


def oracle_tower(*inputs):
    """The oracle's tower of 24 layers, which is shown the inputs of these names by their numbers."""
    rows = torch.stack([load_file(GOLDEN / f"clip_{name}.safetensors")["inputs_embeds"].float() for name in inputs])
    side = math.isqrt(rows.shape[1] - 1)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=24,
        num_attention_heads=4,
        image_size=side,
        patch_size=1,
    )
    model = CLIPVisionModel(config).eval().requires_grad_(False)
    weights = {name: value.float() for name, value in load_file(GOLDEN / "clip_weights.safetensors").items()}
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and not [name for name in missing.missing_keys if "encoder" in name]
    tower = find_tower(model)
    return SimpleNamespace(
        tower=type(tower)(tower.geometry, Embeddings(rows), None, tower.layers, tower.num_heads),
        pixels=torch.arange(len(rows)).float()[:, None, None, None].expand(-1, 3, side, side),
    )


@pytest.mark.parametrize(("name", "num_tokens"), CASES)
def test_flowcut_equals_its_own_code(name, num_tokens):
    """Also what is left after each cut, in the attention rows that later layers then have."""
    given = oracle_tower(name)
    wanted = load_file(GOLDEN / f"flowcut_{name}_k{num_tokens}.safetensors")
    lengths = []
    handles = [
        layer.register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1] - 1))
        for layer in given.tower.layers
    ]
    vision = run_planned(given.tower, given.pixels, -2, TowerPlan(pruner=FlowPruner(num_tokens)))
    for handle in handles:
        handle.remove()
    left = {int(key.removeprefix("kept_index_layer")): len(v) for key, v in wanted.items() if "_layer" in key}
    assert len(lengths) == 23 and all(lengths[layer + 1] == count for layer, count in left.items())
    kept = wanted["kept_index_sorted"].long()
    assert vision.signals[Signal("present")][0].nonzero().flatten().tolist() == kept.tolist()
    torch.testing.assert_close(vision.hidden[0, 1 + kept], wanted["features"], rtol=1e-5, atol=1e-5)
    tokens = vzip.FlowCut(budget(num_tokens))(vision)
    assert (tokens.places[0] - 1).tolist() == kept.tolist()
    assert torch.equal(tokens.tokens[0], vision.hidden[0, 1 + kept])
    gone = torch.ones(vision.num_rows, dtype=torch.bool).index_fill(0, torch.cat([kept + 1, torch.tensor([0])]), False)
    assert not vision.hidden[0, gone].any()


def flowcut_by_loops(layers, rows, num_tokens, num_layers, num_heads):
    """One image: the patches kept and their rows, with every map written out."""
    kept, before = list(range(len(rows) - 1)), None
    for index in range(num_layers):
        layer, count = layers[index], len(kept)
        normed = layer.layer_norm1(rows)
        query, key, value = (
            getattr(layer.self_attn, f"{name}_proj")(normed).unflatten(-1, (num_heads, -1)).tolist() for name in "qkv"
        )
        rows = layer(rows[None], None)[0]
        if count <= num_tokens or index > max(num_layers - 2, 0):
            continue
        shares = []
        for one, other, scale in ((query, key, len(query[0][0]) ** -0.5), (value, value, 1.0)):
            summed = [0.0] * count
            for head in range(num_heads):
                raw = [scale * sum(x * y for x, y in zip(one[0][head], row[head], strict=True)) for row in other]
                top = max(raw)
                exponents = [math.exp(x - top) for x in raw]
                summed = [s + e / sum(exponents) for s, e in zip(summed, exponents[1:], strict=True)]
            shares.append([s / sum(summed) for s in summed])
        norms = [sum(abs(sum(head[d] for head in row)) / num_heads for d in range(len(row[0]))) for row in value[1:]]
        score = [(a + b) * norm for a, b, norm in zip(*shares, norms, strict=True)]
        before = score if before is None else [0.5 * old + 0.5 * new for old, new in zip(before, score, strict=True)]
        to_go = max(num_layers - 2, 0) - index
        if to_go % 2:
            continue
        entropy = -sum(share * math.log(share) for share in shares[0])
        going = count - num_tokens
        if to_go:
            going = round(going / math.sqrt(to_go) * (1 - (entropy / math.log(count)) ** 2))
        best = sorted(sorted(range(count), key=lambda i: (-before[i], i))[: count - going])
        kept, before = [kept[i] for i in best], [before[i] for i in best]
        rows = torch.stack([rows[0], *(rows[1 + i] for i in best)])
    return kept, rows[1:]


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [2, 3, 4, 7])
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
def test_flowcut_equals_plain_loops_in_any_batch(num_layers, num_tokens):
    """With -2: one layer runs (all goes after it), two, three, six. Crops of a batch lose different numbers."""
    torch.manual_seed(0)
    model = CLIPVisionModel(tiny.vision_config("clip", num_layers)).eval()
    tiny.sharpen(model, "clip")
    tower, pixels = find_tower(model), tiny.pixels(3)
    vision = run_planned(tower, pixels, -2, TowerPlan(pruner=FlowPruner(num_tokens)))
    for crop, embedded in enumerate(tower.embed(pixels)):
        kept, rows = flowcut_by_loops(tower.layers, embedded, num_tokens, num_layers - 1, tower.num_heads)
        assert vision.signals[Signal("present")][crop].nonzero().flatten().tolist() == kept
        torch.testing.assert_close(vision.hidden[crop, 1 + torch.tensor(kept)], rows, rtol=0, atol=1e-5)


def hand_state(**changes):
    """Two crops of six patches, one head of width one: CLS's query is 0, so that it attends evenly."""
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 6.0, -5.0, 4.0, 3.0, 2.0, 1.0]])[..., None]
    rows = torch.zeros(2, 7, 1)
    state = {
        "index": 1,
        "num_layers": 7,
        "queries": rows,
        "keys": rows,
        "values": values,
        "num_heads": 1,
        "scale": 1.0,
        "num_patches": torch.tensor([6, 6]),
        "shown": None,
        "carried": None,
    }
    return LayerState(**{**state, **changes})


def test_flowcut_by_hand():
    """CLS's query and value are 0: both shares are 1/6, so a score is 2/6 of the value's length: 1/3, 2/3, 1, ...

    With what the layer before left (3 for the first patch, 0 else) it is (3 + 1/3) / 2, then halves. An even attention
    drops nothing. With CLS's query 1 and keys ln 6 at the first patch, 0 at the others, shares are 6/11 and 1/11 each:
    entropy 6/11 ln(11/6) + 5/11 ln 11 = 1.4206, ln 6 = 1.7918, e = 0.7929, 1 - e ** 2 = 0.3714. Of a surplus of 5 at
    four layers to go 5 / 2 * 0.3714 = 0.93, so 1 patch goes; at the last cut the tower drops all 5.
    The second crop, with four patches, has shares 6/9, 1/9, 1/9, 1/9: entropy 1.0027, e = 0.7233, 1 - e ** 2 = 0.4768,
    a surplus of 3: 3 / 2 * 0.4768 = 0.72: 1.
    """
    pruner = FlowPruner(1)
    score, dropped = pruner.judge(hand_state())
    torch.testing.assert_close(score, torch.tensor([[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1]]) / 3)
    assert dropped.tolist() == [0, 0]
    carried = torch.tensor([[3.0, 0, 0, 0, 0, 0]] * 2)
    score, _ = pruner.judge(hand_state(carried=carried))
    torch.testing.assert_close(score[0], torch.tensor([10.0, 2, 3, 4, 5, 6]) / 6)
    queries, keys = torch.zeros(2, 7, 1), torch.zeros(2, 7, 1)
    queries[:, 0], keys[:, 1] = 1.0, math.log(6)
    shown = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    _, dropped = pruner.judge(hand_state(queries=queries, keys=keys, shown=shown, num_patches=torch.tensor([6, 4])))
    assert dropped.tolist() == [1, 1]
    assert [list(pruner.cuts(n)) for n in (1, 2, 3, 4, 7)] == [[0], [0], [1], [0, 2], [1, 3, 5]]


@torch.no_grad()
@pytest.mark.parametrize("kind", [vzip.FlowCut, vzip.Resized])
def test_keeping_everything_is_stock(kind):
    model, pixels = tiny.llava(), tiny.pixels(2)
    stock = vzip.CompressedVlm(model, vzip.Identity()).encode_images(pixels)
    ours = vzip.CompressedVlm(model, kind(budget(tiny.NUM_PATCHES))).encode_images(pixels)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 9, 32])
def test_flowcut_of_an_image_of_one_colour_keeps_as_many(num_tokens):
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.FlowCut(budget(num_tokens)))
    assert len(vlm.encode_images(torch.zeros(1, 3, 112, 112))[0]) == num_tokens


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(("num_tokens", "grid"), [(16, (4, 4)), (32, (4, 8)), (12, (3, 4)), (1, (1, 1))])
def test_resized_runs_the_tower_on_the_smaller_image(tower, num_tokens, grid):
    """Hugging Face's own tower on the resized pixels, its positions interpolated; every token at its cell's middle."""
    model, pixels = tiny.llava(tower), tiny.pixels(2)
    vlm = vzip.CompressedVlm(model, vzip.Resized(budget(num_tokens)))
    lengths = []
    layers = vlm.adapter.tower.layers
    handle = layers[0].register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    tokens = vlm.encode_images(pixels)
    handle.remove()
    has_cls = tower == "clip"
    assert lengths == [num_tokens + has_cls] and [len(own) for own in tokens] == [num_tokens] * 2
    size = [side * tiny.PATCH_SIZE for side in grid]
    small = functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    output = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
    rows = output.hidden_states[-2][:, int(has_cls) :]
    torch.testing.assert_close(torch.stack(tokens), model.model.multi_modal_projector(rows), rtol=0, atol=1e-5)
    places = middle_places((8, 8), grid, torch.device("cpu"))
    visual = vlm.adapter.read_inputs(pixel_values=pixels)
    vision = vlm.adapter.image_output(visual, vlm.compressor.reads(), vlm.adapter.run_for(vlm.compressor))
    assert (vlm.compressor(vision).places[0] - int(has_cls)).tolist() == places.tolist()


def test_middle_places_by_hand():
    """8 x 8 as 2 x 4: cells of four rows and two columns; the middle is the second row and the first column of each."""
    assert middle_places((8, 8), (2, 4), torch.device("cpu")).tolist() == [8, 10, 12, 14, 40, 42, 44, 46]
    assert middle_places((3, 3), (3, 3), torch.device("cpu")).tolist() == list(range(9))


@pytest.mark.parametrize(
    ("num_tokens", "grid"), [(64, (8, 8)), (128, (8, 16)), (192, (12, 16)), (32, (4, 8)), (16, (4, 4)), (576, (24, 24))]
)
def test_resized_grids(num_tokens, grid):
    shape = vzip.compressors.VisionShape("image", 1, (24, 24), True, 576)
    assert vzip.Resized(budget(num_tokens)).plan(shape).grid == grid


@pytest.mark.parametrize(("num_tokens", "near"), [(3, "2 and 4"), (17, "16 and 18"), (512, "506 and 528")])
def test_resized_refuses_what_is_no_grid(num_tokens, near):
    shape = vzip.compressors.VisionShape("image", 1, (24, 24), True, 576)
    with pytest.raises(ConfigError, match=f"at most 2 times as wide or as tall.*allowed are {near}: change the budget"):
        vzip.Resized(budget(num_tokens)).num_tokens(shape)


@torch.no_grad()
def test_a_cache_of_tower_outputs_is_not_shared_with_plans():
    pixels, model = tiny.pixels(2), tiny.llava()
    kinds = [vzip.VisionZip, vzip.FlowCut, vzip.Resized, vzip.FlowCut, vzip.VisionZip, vzip.Resized]
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    results = []
    for cache in (None, TowerCache(1.0)):
        vlm.adapter.tower_cache = cache
        for kind in kinds:
            vlm.compressor = kind(budget(9))
            results.append(torch.stack(vlm.encode_images(pixels)))
    assert all(torch.equal(a, b) for a, b in zip(results[:6], results[6:], strict=True))
    assert cache.counts == {"num_hits": 2, "num_misses": 2}


def test_refused_by_name_before_anything_is_loaded():
    siglip, clip = tiny.llava("siglip"), tiny.llava()
    qwen, gemini = tiny_qwen.build(), tiny_mini_gemini.mini_gemini()
    for model, kind, message in (
        (siglip, vzip.FlowCut, r"compressor=FlowCut drops patches.*\(SigLIP\) has none"),
        (qwen, vzip.FlowCut, "compressor=FlowCut drops patches inside.*Qwen2_5_VL.*does not allow"),
        (qwen, vzip.Resized, "compressor=Resized makes the image smaller.*images have any size"),
        (gemini, vzip.Resized, "compressor=Resized makes the image smaller.*MiniGemini.*mines a window"),
    ):
        compressor = kind(budget(9))
        with pytest.raises(ConfigError, match=message):
            vzip.CompressedVlm(model, compressor)
        adapter = type(vzip.CompressedVlm(model, vzip.Identity()).adapter)
        with pytest.raises(ConfigError, match=message):
            adapter.check_settings(model.config, compressor, FamilyOptions())

    class ReadsKeys(vzip.FlowCut):
        def reads(self):
            return super().reads() | {Signal("keys")}

    with pytest.raises(ConfigError, match="ReadsKeys reads keys of a vision tower that does not run on all patches"):
        vzip.CompressedVlm(clip, ReadsKeys(budget(9)))
    vlm = vzip.CompressedVlm(clip, vzip.FlowCut(budget(9)))
    vlm.adapter.select_layer = 0
    with pytest.raises(UnsupportedModelError, match="no layer runs between which"):
        vlm.encode_images(tiny.pixels(1))


@torch.no_grad()
@pytest.mark.parametrize("without_contents", ["meta", "fake"])
def test_flowcut_without_contents_ends_with_as_many(without_contents):
    """What the bench and the estimate of memory run: shapes alone."""
    model = CLIPVisionModel(tiny.vision_config("clip", 4)).eval()
    plan = TowerPlan(pruner=FlowPruner(9))
    if without_contents == "meta":
        vision = run_planned(find_tower(model.to("meta")), tiny.pixels(2).to("meta"), -2, plan)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            vision = run_planned(find_tower(model), torch.zeros(2, 3, 112, 112), -2, plan)
    assert vision.hidden.shape == (2, 65, 32) and vision.signals[Signal("present")].shape == (2, 64)


def test_both_are_options():
    assert {"flowcut", "resized"} <= set(methods.METHODS)
