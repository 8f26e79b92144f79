"""The machine's limit: which products a stage has, and what it would take at their rate; never the times themselves."""

from __future__ import annotations

import pytest
import torch
from tests.bench.conftest import build
from torch import nn

from vzip.bench import limit
from vzip.bench.hooks import Seen
from vzip.bench.run import look, measure
from vzip.bench.settings import BenchSettings
from vzip.bench.shapes import BenchModel
from vzip.bench.stages import Vzip
from vzip.bench.timing import Stopwatch, Timing

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_inference", [True, False])
def test_products_are_seen_by_stage(is_inference: bool) -> None:
    linear, convolution = nn.Linear(8, 5), nn.Conv2d(3, 6, kernel_size=4, stride=4)
    watch = Stopwatch(CPU)
    with torch.inference_mode(is_inference), Seen(watch) as seen:
        linear(torch.ones(7, 8))  # of no stage
        with watch.stage("tower"):
            linear(torch.ones(2, 3, 8)), linear(torch.ones(6, 8)), convolution(torch.ones(2, 3, 8, 12))
            torch.ones(4, 4, 4) @ torch.ones(4, 4, 4)  # no weights: attention
        with watch.stage("prefill"):
            torch.ones(9, 8) @ torch.ones(8, 2)
    assert seen.products["tower"] == {(6, 8, 5): 2, (12, 48, 6): 1}
    assert seen.products.get("prefill", {}) in ({(9, 8, 2): 1}, {}) and set(seen.products) <= {"tower", "prefill"}


def test_the_towers_products_are_its_layers(clip_tower: BenchModel) -> None:
    """By hand: two crops of 65 rows, three layers of four that run, 64 patches of 14 x 14 x 3 each."""
    workload = build(clip_tower, methods=("vzip",), num_crops=2)
    products = look(Vzip(workload)).products["tower"]
    assert products == {(128, 588, 32): 1, (130, 32, 32): 3 * 4, (130, 32, 80): 3, (130, 80, 32): 3}


def test_a_rate_is_all_operations_over_all_time() -> None:
    products = {"tower": {(100, 10, 10): 3, (10, 100, 20): 1, (1, 1, 1): 1}, "splice": {(5, 5, 5): 1}}
    assert limit.main_shapes(products["tower"]) == {(100, 10, 10): 3, (10, 100, 20): 1}  # the third is nothing
    timings = {"100 x 10 x 10": Timing.of([2.0]), "10 x 100 x 20": Timing.of([4.0])}
    assert limit.rates(products, timings) == {"tower": pytest.approx((3 * 20000 + 40000) / (3 * 2e-3 + 4e-3))}
    bare = limit.BareProducts.of([products, {"prefill": {(3, 2, 1): 1}}], CPU, torch.float32)
    assert set(bare.run()) == {"100 x 10 x 10", "10 x 100 x 20", "3 x 2 x 1"}


def test_a_measurement_says_how_near_it_came(clip_tower: BenchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vzip.bench.shapes.resolve", lambda _name: clip_tower)
    settings = BenchSettings(budget="12+4", device="cpu", methods=("vanilla", "vzip"), repeats=2, warmup=0)
    result = measure(settings)
    ours = result.methods["vzip"]
    taken = ours.stages["tower"].median_ms + ours.stages["selection"].median_ms
    rate = 1e9 * ours.limit_gflops["tower"]
    assert ours.limit_ms["tower"] == pytest.approx(1e3 * ours.flops["tower"].counted / rate)
    assert result.ratios()["tower_share_of_limit"] == pytest.approx(ours.limit_ms["tower"] / taken)
    assert set(result.products) == {"64 x 588 x 32", "65 x 32 x 32", "65 x 32 x 80", "65 x 80 x 32"}
    assert all(len(timing.samples_ms) == 2 for timing in result.products.values())
    assert set(ours.limit_ms) == {"tower"}  # no language model
