"""Operators, memory and waits for the device that we add to the unmodified model are those in ``operators.json``."""

from __future__ import annotations

import json

import pytest
import torch
from tests import tiny
from tests.models.operators import COMPRESSOR, COUNTS, MODELS, changes, counted, measure

import vzip

KNOWN = json.loads(COUNTS.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_computed_that_was_not_before(name: str) -> None:
    changed = changes(KNOWN["models"][name], MODELS[name]())
    assert not changed, (
        f"{name}: "
        + "; ".join(changed)
        + ". If that is worth it: python -m tests.models.operators, and say why in the commit."
    )


def test_every_wait_for_the_device_has_a_reason() -> None:
    parts = [part for model in KNOWN["models"].values() for part in model.values()]
    assert {place for part in parts for place in part["waits"]} == set(KNOWN["why_the_host_waits"])
    assert all(len(reason) > 20 for reason in KNOWN["why_the_host_waits"].values())


@torch.no_grad()
def test_the_tower_stops_at_the_layer_that_is_read() -> None:
    model = tiny.llava(num_layers=6)
    count = counted(model, lambda: vzip.CompressedVlm(model, COMPRESSOR).encode_images(tiny.pixels(1)))
    assert count.calls == {"CLIPEncoderLayer": 5}


def test_what_is_added_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def select(self: vzip.VisionZip, vision: vzip.compressors.VisionOutput, _own=vzip.VisionZip.select):  # type: ignore[no-untyped-def]
        assert vision.attention is not None
        vision.attention.sort(), vision.keys.tolist(), bool(vision.hidden[0, 0, 0] > 0)
        return _own(self, vision)

    monkeypatch.setattr(vzip.VisionZip, "select", select)
    ids = torch.tensor([[1, 5, tiny.IMAGE_TOKEN, 7]])
    found = changes(KNOWN["models"]["llava15"], measure(tiny.llava(), tiny.llava_inputs(1), ids))
    assert "encode operators sort 2 -> 3" in found
    assert any(line.startswith("encode waits") for line in found) and not any(
        line.startswith("decode") for line in found
    )
