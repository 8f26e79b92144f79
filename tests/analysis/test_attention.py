"""Attention by layer against Hugging Face's own maps, and what is counted of it against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from tests.analysis.towers import tower
from tests.tiny import pixels

from vzip.analysis.attention import (
    CLS,
    EDGES,
    RECEIVED,
    chance_distance,
    distances,
    each_layer,
    entropy,
    histogram,
    num_top,
    softmax_slope,
    top_mass,
)
from vzip.models.towers.structure import find_tower


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_layer_by_layer_as_hugging_faces_eager_maps(kind):
    images = pixels(2)
    with torch.no_grad():
        maps = tower(kind, eager=True)(images, output_attentions=True).attentions  # [N, H, L, L] a layer
    found = list(each_layer(find_tower(tower(kind)), images, range(1, 5)))
    assert [one.layer for one in found] == [1, 2, 3, 4] and len(maps) == 4
    first = int(kind == "clip")
    for one, full in zip(found, maps, strict=True):
        mean = full.double().mean(dim=1)
        received = mean.mean(dim=1)[:, first:]
        ours = one.maps()
        assert set(ours) == ({CLS, RECEIVED} if first else {RECEIVED})
        close = {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(ours[RECEIVED].double(), received / received.sum(dim=1, keepdim=True), **close)
        if first:
            cls = mean[:, 0, 1:]
            torch.testing.assert_close(ours[CLS].double(), cls / cls.sum(dim=1, keepdim=True), **close)
        rows = mean[:, first:, first:]
        rows = rows / rows.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(one.of_patches(torch.tensor([0, 9, 63])).double(), rows[:, [0, 9, 63]], **close)
        proxies = one.proxies()
        torch.testing.assert_close(rows.gather(-1, proxies.index[..., None])[..., 0], rows.amax(dim=-1), **close)
        assert float((proxies.index == rows.argmax(dim=-1)).double().mean()) > 0.98  # but for ties in the last bits
        for image in range(2):
            for patch in range(64):
                row, column = divmod(patch, 8)
                far = [math.hypot(row - other // 8, column - other % 8) for other in range(64)]
                proxy = int(proxies.index[image, patch])
                assert float(proxies.distance[image, patch]) == pytest.approx(far[proxy])
                by_attention = sum(f * w for f, w in zip(far, rows[image, patch].tolist(), strict=True))
                assert float(proxies.mean_distance[image, patch]) == pytest.approx(by_attention, rel=1e-4)


def test_blocks_change_nothing_and_only_asked_layers_come(monkeypatch):
    taken = find_tower(tower("clip"))
    (whole,) = each_layer(taken, pixels(1), {3})
    assert whole.layer == 3
    before = whole.proxies()
    monkeypatch.setattr("vzip.analysis.attention.BLOCK_ELEMENTS", 1000)  # three patches at a time
    after = whole.proxies()
    assert torch.equal(before.index, after.index)
    torch.testing.assert_close(before.mean_distance, after.mean_distance, rtol=1e-5, atol=0)
    assert not any(module._forward_hooks for layer in taken.layers for module in layer.modules())


def test_entropy_and_top_mass_of_known_distributions():
    even = torch.full((1, 576), 1 / 576)
    assert float(entropy(even)) == pytest.approx(math.log(576), rel=1e-6)
    assert [num_top(576, share) for share in (0.01, 0.05, 0.10)] == [6, 29, 58] and num_top(64, 0.01) == 1
    assert num_top(100, 0.05) == 5  # and not 6 by rounding up 5.000000000000001
    assert float(top_mass(even, 0.10)) == pytest.approx(58 / 576)
    one = torch.zeros(1, 576)
    one[0, 7] = 1
    assert float(entropy(one)) == 0 and float(top_mass(one, 0.01)) == 1
    weights = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert float(entropy(weights)) == pytest.approx(1.75 * math.log(2))
    assert float(top_mass(weights, 0.5)) == 0.75


def test_histogram_has_every_weight_once():
    weights = torch.softmax(4 * torch.randn(3, 500, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights[0, :2] = torch.tensor([0.0, 1e-9])
    counts, sums = histogram(weights)
    assert int(counts.sum()) == 1500 and float(sums.sum()) == pytest.approx(float(weights.double().sum()))
    for number, (low, high) in enumerate(zip(EDGES[:-1].tolist(), EDGES[1:].tolist(), strict=True)):
        inside = [w for w in weights.double().flatten().tolist() if (low < w or number == 0) and w <= high]
        assert len(inside) == counts[number] and sum(inside) == pytest.approx(float(sums[number]))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 5), (8, 8)])
def test_chance_distance_is_the_mean_over_all_pairs(grid):
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    all_pairs = [math.dist(a, b) for a in places for b in places]
    assert chance_distance(grid) == pytest.approx(sum(all_pairs) / len(all_pairs))
    assert distances(grid).flatten().tolist() == pytest.approx(all_pairs)


def test_the_slope_is_the_derivative():
    z = torch.tensor([-2.0, 0.0, math.log(575), 9.0], dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(4, 576, dtype=torch.float64)
    share = torch.softmax(torch.cat([z[:, None], logits[:, 1:]], dim=1), dim=1)[:, 0]
    share.sum().backward()
    ours, slope = softmax_slope(z.detach(), 576)
    torch.testing.assert_close(ours, share.detach())
    torch.testing.assert_close(slope, z.grad)
    assert float(slope[2]) == pytest.approx(0.25)
