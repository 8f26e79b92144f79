"""Kept outputs are the tower's, bit for bit, and one model serves many runs."""

from __future__ import annotations

import pytest
import torch
from tests import tiny

import vzip
from vzip.errors import ConfigError
from vzip.models import model_cache as reuse
from vzip.models.model_cache import ModelKeeper
from vzip.models.towers.cache import BYTES_PER_GIB, NewestTowerCache, TowerCache

BUDGET = vzip.TokenBudget(6, 2)
METHODS = [
    vzip.Identity(),
    vzip.VisionZip(BUDGET),
    vzip.VisionZip(BUDGET, score="key_norms"),
    vzip.RandomTokens(BUDGET),
]
METHODS += [vzip.VisionZip(BUDGET, score_layer=1)]


@pytest.fixture(params=["llava", "llava_next", "video_llava"])
def vlm_and_inputs(request: pytest.FixtureRequest) -> tuple[vzip.CompressedVlm, dict[str, torch.Tensor], str]:
    builder, inputs = {
        "llava": (tiny.llava, tiny.llava_inputs),
        "llava_next": (tiny.llava_next, tiny.next_inputs),
        "video_llava": (tiny.video_llava, tiny.video_inputs),
    }[request.param]
    encode = "encode_videos" if request.param == "video_llava" else "encode_images"
    return vzip.CompressedVlm(builder(), vzip.Identity()), inputs(2), encode


def count_layers(vlm: vzip.CompressedVlm) -> list[int]:
    """How often the first layer of any tower ran."""
    calls: list[int] = []
    towers = [vlm.adapter.tower, *([vlm.adapter.frame_tower] if vlm.adapter.has_video else [])]
    for tower in towers:
        tower.layers[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def test_kept_outputs_give_the_very_same_visual_tokens(vlm_and_inputs) -> None:
    vlm, inputs, encode = vlm_and_inputs
    expected = []
    for method in METHODS:
        vlm.compressor = method
        expected.append(getattr(vlm, encode)(**inputs))
    calls = count_layers(vlm)
    vlm.adapter.tower_cache = TowerCache(1.0)
    for round_number in range(2):
        for method, plain in zip(METHODS, expected, strict=True):
            vlm.compressor = method
            kept = getattr(vlm, encode)(**inputs)
            assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True)), method
        # Once for all usual methods, once more for a score that is not read anyway, once for another layer's.
        assert len(calls) == 3, round_number
    assert vlm.adapter.tower_cache.num_misses * 7 == vlm.adapter.tower_cache.num_hits * 3


@torch.no_grad()
def test_other_images_and_other_batches_are_not_taken_for_known_ones() -> None:
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET))
    pixels = tiny.llava_inputs(3)["pixel_values"]
    plain = [vlm.encode_images(part) for part in (pixels, pixels[:2], pixels[:2].flip(0), pixels[:2].flip(3))]
    vlm.adapter.tower_cache = cache = TowerCache(1.0)
    kept = [vlm.encode_images(part) for part in (pixels, pixels[:2], pixels[:2].flip(0), pixels[:2].flip(3))]
    assert cache.counts == {"num_hits": 0, "num_misses": 9}
    for ours, theirs in zip(kept, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_a_full_cache_keeps_what_it_has() -> None:
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET))
    pictures = list(tiny.llava_inputs(3)["pixel_values"].split(1))
    vlm.adapter.tower_cache = TowerCache(1.0)
    vlm.encode_images(pictures[0])
    one = vlm.adapter.tower_cache.num_bytes
    # hidden, attention and keys of 65 rows and 64 patches: what the cache says it holds is what it holds.
    vision = vlm.adapter.image_output(vlm.adapter.read_inputs(pixel_values=pictures[0]), vlm.compressor.reads())
    assert one == sum(t.nbytes for t in (vision.hidden, vision.attention, vision.keys))
    vlm.adapter.tower_cache = cache = TowerCache(2.5 * one / BYTES_PER_GIB)
    for _ in range(2):
        for picture in pictures:
            vlm.encode_images(picture)
    assert cache.counts == {"num_hits": 2, "num_misses": 4} and cache.num_bytes == 2 * one
    with pytest.raises(ConfigError, match="tower_cache_gib=-1"):
        TowerCache(-1)


def test_the_cache_of_a_page_makes_room_for_what_is_new() -> None:
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET))
    pictures = list(tiny.llava_inputs(3)["pixel_values"].split(1))
    vlm.adapter.tower_cache = cache = NewestTowerCache(1.0)
    with torch.no_grad():
        vlm.encode_images(pictures[0])
        one = cache.num_bytes
        vlm.adapter.tower_cache = cache = NewestTowerCache(2.5 * one / BYTES_PER_GIB)
        for number in (0, 1, 2, 2, 1, 0):  # the first makes room for the third, and comes back for the second
            vlm.encode_images(pictures[number])
        assert cache.counts == {"num_hits": 2, "num_misses": 4} and cache.num_bytes == 2 * one
        vlm.compressor = vzip.VisionZip(BUDGET, score="key_norms")  # a further signal: in place of what was kept
        vlm.encode_images(pictures[0])
        assert cache.counts["num_misses"] == 5 and one < cache.num_bytes <= 2.5 * one
        cache.max_gib = 0.5 * one / BYTES_PER_GIB
        vlm.encode_images(pictures[1])
        assert cache.num_bytes == 0, "too large by itself"


def test_nothing_is_kept_where_gradients_are_wanted() -> None:
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET))
    vlm.adapter.tower_cache = TowerCache(1.0)
    vlm.encode_images(**tiny.llava_inputs(1))
    assert vlm.adapter.tower_cache.num_bytes == 0


def test_a_model_is_loaded_again_only_if_its_arguments_change(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, object]] = []

    def load(compressor: vzip.Compressor, **arguments: object) -> vzip.CompressedVlm:
        loaded.append(arguments)
        return vzip.CompressedVlm(tiny.llava(), compressor)

    monkeypatch.setattr(reuse, "load_vlm", load)
    keeper = ModelKeeper()
    first = keeper.load({"name_or_path": "a", "dtype": "auto"}, vzip.VisionZip(BUDGET), tower_cache_gib=0.5)
    with torch.no_grad():
        first.encode_images(**tiny.llava_inputs(1))
    again = keeper.load({"name_or_path": "a", "dtype": "auto"}, vzip.RandomTokens(BUDGET), tower_cache_gib=0.5)
    assert again is first and again.compressor == vzip.RandomTokens(BUDGET) and len(loaded) == 1
    cache = again.adapter.tower_cache
    assert cache.num_bytes > 0 and cache.counts == {"num_hits": 0, "num_misses": 0}, "kept, and counted anew"
    with pytest.raises(ConfigError, match="to choose from"):
        keeper.load({"name_or_path": "a", "dtype": "auto"}, vzip.UniformTokens(vzip.TokenBudget(60, 40)))
    assert keeper.load({"name_or_path": "a", "dtype": "auto"}, vzip.Identity()).adapter.tower_cache is None
    other = keeper.load({"name_or_path": "a", "dtype": "float32"}, vzip.VisionZip(BUDGET))
    assert other is not first and [arguments["dtype"] for arguments in loaded] == ["auto", "float32"]
