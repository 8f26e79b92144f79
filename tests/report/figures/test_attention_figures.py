"""Figures of attention on a tower with a planted sink, whose every number is known by hand; on towers without CLS."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.analysis.towers import SINK, SINK_SHARE, save, tower, with_sink

from vzip import cli

FIRST_LAYER = 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (112, 90 + 11 * number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def sink(tmp_path_factory) -> Path:
    return save(with_sink(FIRST_LAYER), tmp_path_factory.mktemp("towers") / "sink")


def drawn(number: int, model: Path, photos: Path, out: Path, *words: str) -> tuple[list[dict[str, str]], str]:
    """The CSV and the caption."""
    command = ["figure", str(number), f"model={model}", "--images", str(photos), "--out", str(out), *words]
    assert cli.main(command) == 0
    with Image.open(out / f"figure_{number}.png") as image:
        assert image.format == "PNG" and min(image.size) > 400
    assert b"<svg" in (out / f"figure_{number}.svg").read_bytes()
    with (out / f"figure_{number}.csv").open() as file:
        return list(csv.DictReader(file)), (out / f"figure_{number}.txt").read_text()


def test_figure_5_shows_the_sink_from_its_layer_on(sink, photos, tmp_path):
    rows, caption = drawn(5, sink, photos, tmp_path)
    # Of all 65 rows the sink has 0.9, the 63 other patches 0.1 / 64 each; here of what goes to patches.
    other = (1 - SINK_SHARE) / 64
    p, q = (share / (SINK_SHARE + 63 * other) for share in (SINK_SHARE, other))
    sunk = {"entropy_nats": -p * math.log(p) - 63 * q * math.log(q), "top_10_percent": p + 6 * q}  # seven of 64
    even = {"entropy_nats": math.log(64), "top_10_percent": 7 / 64}
    curves = [row for row in rows if row["part"] != "map"]
    assert {(row["part"], row["score"], row["layer"]) for row in curves} == {
        (part, score, str(layer)) for part in even for score in ("CLS", "received") for layer in range(1, 6)
    }
    for row in curves:
        expected = sunk if int(row["layer"]) >= FIRST_LAYER else even
        for column in ("value", "low", "high"):
            assert float(row[column]) == pytest.approx(expected[row["part"]], rel=1e-4), row
    for layer in range(1, 6):
        shown = {
            int(r["row"]) * 8 + int(r["column"]): float(r["value"])
            for r in rows
            if r["layer"] == str(layer) and r["part"] == "map"
        }
        assert len(shown) == 64
        assert shown[SINK] == pytest.approx(p if layer >= FIRST_LAYER else 1 / 64, rel=1e-4)
    assert "5 images of the folder" in caption and "layer 4, the second-last layer" in caption


def test_figures_6_and_14_find_the_sink_as_everyones_proxy(sink, photos, tmp_path):
    rows, _ = drawn(14, sink, photos, tmp_path, "--patch", "0,1")
    far = [math.hypot(patch // 8 - SINK // 8, patch % 8 - SINK % 8) for patch in range(64)]
    pairs = [math.dist(divmod(a, 8), divmod(b, 8)) for a in range(64) for b in range(64)]
    found = {
        (row["part"], row["layer"]): float(row["value"]) for row in rows if row["part"] != "map" and not row["from"]
    }
    chance = sum(pairs) / 64**2
    assert found["distance_by_chance", ""] == pytest.approx(chance)
    for layer in range(FIRST_LAYER, 6):
        assert found["distance_to_proxy", str(layer)] == pytest.approx(sum(far) / 64)
        assert found["num_proxies", str(layer)] == 1 and found["is_its_own_proxy", str(layer)] == 1 / 64
    assert found["mean_distance", "1"] == pytest.approx(chance, rel=1e-5), "even attention is chance"
    bins = {int(row["from"]): float(row["value"]) for row in rows if row["part"] == "histogram"}
    assert all(bins[start] == pytest.approx(sum(int(d) == start for d in far) / 64) for start in bins)
    rows, caption = drawn(6, sink, photos, tmp_path, "--pixel", "15,0", "--layer", "5")
    assert "patch 0,1 (row, column" in caption and "in layer 5, the chosen layer" in caption  # patches of 14 pixels
    slopes = [row for row in rows if row["part"] == "slope"]
    for row in slopes[::40]:
        share = math.exp(float(row["z"])) / (math.exp(float(row["z"])) + 63)
        assert float(row["softmax"]) == pytest.approx(share) and float(row["slope"]) == pytest.approx(
            share * (1 - share)
        )
    (most,) = sorted((row for row in rows if row["part"] == "map"), key=lambda row: -float(row["value"]))[:1]
    assert (int(most["row"]), int(most["column"])) == divmod(SINK, 8)


def test_figure_2_counts_and_the_maps_of_9_are_other_images_than_10s(sink, photos, tmp_path):
    rows, _ = drawn(2, sink, photos, tmp_path)
    other = (1 - SINK_SHARE) / 64
    p, q = (share / (SINK_SHARE + 63 * other) for share in (SINK_SHARE, other))
    tops = {row["part"]: row for row in rows if row["score"] == "CLS" and row["part"].startswith("top")}
    assert float(tops["top_1_percent"]["value"]) == pytest.approx(p, rel=1e-4)
    assert float(tops["top_5_percent"]["value"]) == pytest.approx(p + 3 * q, rel=1e-4)
    bins = [row for row in rows if row["part"] == "histogram" and row["score"] == "received"]
    full = {
        (float(row["from"]) < q <= float(row["to"]), float(row["from"]) < p <= float(row["to"])): row for row in bins
    }
    assert full[True, False]["num_patches"] == str(5 * 63) and full[False, True]["num_patches"] == "5"
    assert sum(int(row["num_patches"]) for row in bins) == 5 * 64
    assert {row["image"] for row in rows if row["part"] == "map"} == {"0.png", "1.png"}
    shown = [{row["image"] for row in drawn(n, sink, photos, tmp_path)[0] if row["part"] == "map"} for n in (9, 10)]
    assert shown == [{"0.png", "1.png", "2.png", "3.png"}, {"4.png"}]


def test_siglip_has_no_cls(photos, tmp_path):
    siglip = save(tower("siglip"), tmp_path / "siglip")
    rows, caption = drawn(12, siglip, photos, tmp_path)
    assert {row["score"] for row in rows} == {"received"} and "CLS" not in caption
    assert {row["image"] for row in rows if row["part"] == "map"} == {"1.png"}
    assert "the tower has no CLS token" in drawn(9, siglip, photos, tmp_path)[1]


@pytest.mark.parametrize("number", [2, 5, 6])
def test_names_are_no_formulas(sink, photos, tmp_path, number, recwarn):
    model = tmp_path / "$\\sink$"
    shutil.copytree(sink, model)
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(photos / "0.png", folder / "$\\foo$ 猫.png")
    rows, _ = drawn(number, model, folder, tmp_path / "out")
    assert {row["image"] for row in rows if row["part"] == "map"} == {"$\\foo$ 猫.png"}
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
