"""What is compiled gives what it gives without, and the way from pixels to visual tokens is one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import accelerate
import pytest
import torch
from tests import tiny, tiny_qwen
from tests.families import FAMILIES
from tests.methods import METHODS, QUESTIONS, Words, build
from tests.tiny import IMAGE_TOKEN

import vzip
from vzip.errors import ConfigError

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


def in_one_graph(family: tiny.Family, kind: tuple[str, str], compressor: vzip.Compressor, backend: str) -> None:
    """Encodes two images in one graph; asserts that the tokens are those without, bit for bit but for inductor."""
    vlm = vzip.CompressedVlm(family.build(*kind), compressor, processor=Words())
    visual = vlm.adapter.read_inputs(**family.inputs(2))
    visual = vlm.asked(visual, QUESTIONS[:2]) if compressor.reads_text else visual
    vlm.adapter.check_capture(compressor)
    expected = vlm.adapter.encode(visual, compressor)
    compiled = torch.compile(vlm.adapter.encode, fullgraph=True, dynamic=False, backend=backend)
    for own, other in zip(compiled(visual, compressor), expected, strict=True):
        if backend == "inductor":  # other kernels, other rounding
            torch.testing.assert_close(own.rows, other.rows, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(own.rows, other.rows)


USUAL = vzip.VisionZip(vzip.TokenBudget(6, 3))
LLAVA, NEXT = tiny.FAMILIES[:2]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "tower"), [(LLAVA, "clip"), (LLAVA, "siglip"), (NEXT, "clip")], ids=lambda value: str(value)
)
def test_a_tower_its_scores_and_its_selection_are_one_graph(family: tiny.Family, tower: str) -> None:
    kind = next(kind for kind in family.kinds if kind[0] == tower)
    in_one_graph(family, kind, USUAL, "aot_eager")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (LLAVA, NEXT)], ids=str)
def test_so_they_are_of_every_family_with_crops_of_one_size(family: tiny.Family) -> None:
    in_one_graph(family, family.kinds[0], USUAL, "eager")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_graph_or_refused_by_name(name: str) -> None:
    method = build(name, vzip.TokenBudget(6, 3), **({"local_layer": 1} if name == "vscan" else {}))
    if name in ("flowcut", "zooprune"):
        with pytest.raises(ConfigError, match=f"compile=tower with compressor={type(method).__name__}: "):
            vzip.CompressedVlm(tiny.llava(), method).adapter.check_capture(method)
        return
    in_one_graph(replace(LLAVA, build=partial(tiny.llava, vocab_size=320)), ("clip", "default"), method, "eager")


@pytest.mark.slow  # a C++ compiler runs
@torch.no_grad()
def test_inductor_makes_the_same_tokens() -> None:
    in_one_graph(LLAVA, ("clip", "default"), USUAL, "inductor")


def test_what_cannot_be_one_graph_is_refused_by_name() -> None:
    qwen = vzip.CompressedVlm(tiny_qwen.build(), USUAL)
    with pytest.raises(ConfigError, match=r"compile=tower with Qwen2_5_VL.*: its images have any size"):
        qwen.adapter.check_capture(USUAL)
    model = tiny.llava()
    accelerate.cpu_offload(model.model.vision_tower)
    with pytest.raises(ConfigError, match="compile=tower with device_map: its weights are fetched from elsewhere"):
        vzip.CompressedVlm(model, USUAL).adapter.check_capture(USUAL)


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
