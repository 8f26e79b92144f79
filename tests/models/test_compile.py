"""What is compiled gives what it gives without: taps see through it, and a whole graph is refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import IMAGE_TOKEN

import vzip

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[1, 5, 6, IMAGE_TOKEN, 7, 8]])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrapped() -> vzip.CompressedVlm:
    return vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.VisionZip(vzip.TokenBudget(6, 3)))


def layers(vlm: vzip.CompressedVlm) -> vzip.CompressedVlm:
    for layer in vlm.adapter.tower.layers:
        layer.compile(backend="eager")
    return vlm


def tower(vlm: vzip.CompressedVlm) -> vzip.CompressedVlm:
    vlm.adapter.vision_tower.compile(backend="eager")
    return vlm


@torch.no_grad()
@pytest.mark.parametrize("compiles", [layers, tower])
def test_a_compiled_tower_gives_the_same_tokens(compiles: Callable[[Any], Any]) -> None:
    expected = wrapped().encode_images(tiny.pixels(2))
    for own, other in zip(compiles(wrapped()).encode_images(tiny.pixels(2)), expected, strict=True):
        assert torch.equal(own, other)


@torch.no_grad()
def test_compiled_encoding_gives_the_same_tokens() -> None:
    vlm, pixels = wrapped(), tiny.pixels(2)
    expected = vlm.encode_images(pixels)
    for own, other in zip(torch.compile(vlm.encode_images, backend="eager")(pixels), expected, strict=True):
        assert torch.equal(own, other)


def test_a_whole_graph_is_refused_by_name() -> None:
    """In a process of its own: after some thousand other tests in one process Dynamo was seen to run it uncompiled."""
    code = (
        "import torch; from tests import tiny; from tests.models.test_compile import wrapped\n"
        "torch.set_grad_enabled(False)\n"
        "torch.compile(wrapped().encode_images, backend='eager', fullgraph=True)(tiny.pixels(2))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "torch._dynamo.exc.Unsupported" in done.stderr
    assert re.search(r"function run_tower .*vzip: .*fullgraph=True cannot be", done.stderr)


@pytest.mark.slow  # Dynamo reads transformers' generate for a minute
@torch.no_grad()
@pytest.mark.parametrize("pruner", [None, vzip.FastV(K=1, keep=4)])
def test_a_compiled_wrapper_gives_the_same_logits_and_answer(pruner: vzip.Pruner | None) -> None:
    pixels, settings = tiny.pixels(1), {"max_new_tokens": 5, "do_sample": False}
    vlm = wrapped()
    vlm.pruner = pruner
    expected = vlm.forward(IDS, pixel_values=pixels).logits
    answer = vlm.generate(IDS, pixel_values=pixels, **settings)
    assert torch.equal(torch.compile(vlm, backend="eager")(IDS, pixel_values=pixels).logits, expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(vlm.generate, backend="eager")(IDS, pixel_values=pixels, **settings), answer)
    assert pruner is None or vlm.last_pruned is not None
