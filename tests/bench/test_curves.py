"""Curves: which points, what is measured of each, and that counts are those of the formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.bench.conftest import bench_model

from vzip.bench import curves, flops, shapes
from vzip.bench.curves import AXES, doublings, measure_curves, of_videos, points_of
from vzip.bench.settings import CURVES, parse
from vzip.errors import ConfigError
from vzip.report.curves import WORDS


def test_the_points_of_each_axis() -> None:
    assert doublings(1, 64) == [1, 2, 4, 8, 16, 32, 64] and doublings(16, 10) == [10] and doublings(1, 5) == [1, 2, 4]
    settings = parse([], CURVES)
    assert (settings.batch_size, settings.num_crops, settings.warmup) == (64, 128, 0)
    points = points_of(settings, shapes.resolve("tiny"))
    found = {axis: [(p.value, p.method) for p in own] for axis, own in points.items()}
    assert found["visual_tokens"] == [(n, "vzip") for n in (16, 32, 64, 128, 256, 512)] + [(576, "vanilla")]
    assert found["crops"] == [(n, "vzip") for n in (1, 2, 4, 8, 16)]
    assert found["frames"][-1] == (128, "vzip") and len(found["batch"]) == 14
    assert [p.settings.batch_size for p in points["batch"]] == [1, 2, 4, 8, 16, 32, 64] * 2
    assert {(p.settings.num_crops, p.settings.batch_size) for p in points["visual_tokens"]} == {(1, 1)}
    assert set(AXES) == set(WORDS) == set(points)


def test_a_small_measurement(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "FEWEST_TOKENS", 32)
    words = [f"model={checkpoint}", "batch_size=2", "num_crops=2", "repeats=1", "num_new_tokens=2", "device=cpu"]
    told: list[tuple[int, int]] = []
    result = measure_curves(parse([*words, "prompt_tokens=7"], CURVES), on_step=lambda *step: told.append(step))
    assert told[-1] == (20, 20), "two passes of each of ten points"
    record = json.loads(json.dumps(result.to_json()))
    points = {axis: {(p["value"], p["method"]): p for p in own} for axis, own in record["methods"].items()}
    assert points["visual_tokens"][32, "vzip"]["num_prompt_tokens"] == 32 + 7
    assert points["visual_tokens"][64, "vanilla"]["num_prompt_tokens"] == 64 + 7
    assert points["frames"][2, "vzip"]["num_prompt_tokens"] == 2 * 17 + 7
    one, two = (points["batch"][n, "vzip"] for n in (1, 2))
    assert two["kv_cache_bytes"] == 2 * one["kv_cache_bytes"] and (one["num_prompts"], two["num_prompts"]) == (1, 2)
    text = shapes.resolve(str(checkpoint)).config.text_config
    for own in record["methods"].values():
        for p in own:
            assert {"tower", "prefill", "decode_per_token", "time_to_first_token"} <= p["stages"].keys()
            for counted in p["flops"].values():
                assert counted["formula"] in (None, counted["counted"])
            expected = flops.decoder_formula(
                text, num_new=p["num_prompt_tokens"], num_past=0, num_logits=1, batch_size=p["num_prompts"]
            )
            assert p["flops"]["prefill"]["formula"] == expected


def test_frames_are_read_by_the_same_parts() -> None:
    model = shapes.resolve("tiny")
    video = of_videos(model, 5000)
    text = video.config.text_config
    assert text.max_position_embeddings == 5000 and model.config.text_config.max_position_embeddings == 2048
    assert text.hidden_size == model.config.text_config.hidden_size
    assert video.config.video_token_id != video.config.image_token_id


@pytest.mark.parametrize("words", [["budget=64tok"], ["methods=vzip"], ["compile=tower"], ["weights=random"]])
def test_what_has_no_meaning_along_the_axes_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="has no meaning with --curves"):
        parse(words, CURVES)


def test_another_family_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "resolve", lambda _name: bench_model(family="llava_next"))
    with pytest.raises(ConfigError, match=r"must be of LLaVA-1\.5's family"):
        measure_curves(parse([], CURVES))
