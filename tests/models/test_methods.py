"""Every method with every family: counts by shapes alone, batches that equal singles, whole images packed as stock."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image
from tests import methods
from tests.families import FAMILIES
from tests.tiny import some_of
from transformers import LlavaOnevisionConfig

import vzip
from vzip.compressors import ChosenUnits, Selection, Signal, TopScores, VisionOutput
from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.models.families import adapter_for_model

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def build(name: str) -> vzip.Compressor:
    return methods.build(name, BUDGET, **({"local_layer": 1, "window": 3} if name == "vscan" else {}))


@pytest.mark.parametrize("name", methods.METHODS)
@each_family
@torch.no_grad()
def test_counts_are_known_before_and_a_batch_equals_singles(family, name, monkeypatch) -> None:
    # Elsewhere this package's own methods are taken at their word: here each selection is checked in each run.
    monkeypatch.setattr(vzip.compressors.Compressor, "is_tested", False)
    model, method = family.build(), build(name)
    if method.tower_use in adapter_for_model(model).cannot_use:
        with pytest.raises(ConfigError, match=f"compressor={type(method).__name__} .*does not allow"):
            vzip.CompressedVlm(model, method)
        return
    vlm = vzip.CompressedVlm(model, method, methods.Words())
    if family.pools and method.tower_use != "whole":
        with pytest.raises(ConfigError, match=f"compressor={type(method).__name__} decides within .* pools a video's"):
            family.encode(vlm, family.inputs(1))
        return
    inputs = family.inputs(3) | {"questions": list(methods.QUESTIONS)}  # the others look at no question
    expected = vlm.expected_num_visual_tokens(**inputs)
    together = family.encode(vlm, inputs)
    assert [len(tokens) for tokens in together] == expected
    if name == "none":
        assert expected == family.stock_lengths(vlm.model, family.inputs(3))
    elif vlm.compressor.scope == "crop" or not vlm.adapter.has_tiles:
        added = [shape.num_added for shape in vlm.adapter.read_inputs(**family.inputs(3)).shapes]
        assert expected == [9 * crops + more for crops, more in zip(family.num_crops(3), added, strict=True)]
    for number, tokens in enumerate(together):
        (alone,) = family.encode(vlm, some_of(inputs, number, number + 1))
        torch.testing.assert_close(tokens, alone, rtol=0, atol=1e-5)


class NewestFirst(TopScores):
    """A method of somebody else's: the later in the image, the better."""

    def score(self, vision: VisionOutput) -> torch.Tensor:
        return torch.arange(vision.num_rows).expand(len(vision.hidden), -1)


@each_family
@torch.no_grad()
def test_a_method_that_only_scores(family) -> None:
    vlm = vzip.CompressedVlm(family.build(), NewestFirst(BUDGET))
    visual = vlm.adapter.read_inputs(**family.inputs(1))
    video = family.medium == "video"
    vision = (vlm.adapter.video_output if video else vlm.adapter.image_output)(visual, frozenset())
    assert vlm.compressor(vision).source_index.tolist() == [list(range(vision.num_rows - 9, vision.num_rows))] * len(
        vision.hidden
    )
    assert len(family.encode(vlm, family.inputs(1))[0]) == vlm.expected_num_visual_tokens(**family.inputs(1))[0]


class EverySecond(ChosenUnits):
    """Of the whole image, packed, whatever its size."""

    scope = "image"
    space = "projected"

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention"), Signal("keys")})

    def num_tokens(self, shape) -> int:
        return shape.num_vanilla // 2

    def choose(self, vision: VisionOutput, num_tokens: int) -> torch.Tensor:
        assert vision.read(Signal("attention")).shape == vision.hidden.shape[:2]
        assert vision.read(Signal("keys")).shape[:2] == vision.hidden.shape[:2]
        self.seen.append(vision)
        return torch.arange(num_tokens).mul(2).expand(len(vision.hidden), -1)


@each_family
@torch.no_grad()
def test_of_a_whole_image_everything_is_packed_alike(family) -> None:
    """Rows are the unmodified model's, and every other signal lies where its row lies."""
    vlm = vzip.CompressedVlm(family.build(), vzip.Identity())
    inputs = family.inputs(2)
    stock = family.encode(vlm, inputs)
    method = EverySecond(BUDGET)
    object.__setattr__(method, "seen", [])
    vlm.compressor = method
    for tokens, whole, vision in zip(family.encode(vlm, inputs), stock, method.seen, strict=True):
        assert torch.equal(vision.hidden[0], whole)
        assert torch.equal(tokens, whole[: len(whole) // 2 * 2 : 2])
    vision, visual = method.seen[0], vlm.adapter.read_inputs(**inputs)
    video = family.medium == "video"
    crops = (vlm.adapter.video_output if video else vlm.adapter.image_output)(visual, method.reads())
    first = crops.first_stock_row
    rows = (crops.hidden if family.pools else vlm.adapter.projector(crops.hidden[:, first:])).flatten(0, 1)
    keys = crops.read(Signal("keys"))[:, first:].flatten(0, 1)
    attention = crops.read(Signal("attention"))[:, first:].flatten(0, 1)
    assert vision.valid is None or not vision.valid.all() or not vlm.adapter.has_tiles
    shrunk = family.config_class is LlavaOnevisionConfig and not family.pools  # behind the base crop; see its own test
    for position in range(0, crops.num_rows if shrunk else vision.num_rows, 7):
        if vision.valid is not None and not vision.valid[0, position]:
            assert not vision.read(Signal("keys"))[0, position].any()  # a newline
            continue
        same = (rows == vision.hidden[0, position]).all(dim=1).nonzero()
        assert len(same) == 1
        assert torch.equal(vision.read(Signal("keys"))[0, position], keys[same[0, 0]])
        assert vision.read(Signal("attention"))[0, position] == attention[same[0, 0]]


class Doubled(vzip.compressors.Budgeted):
    """Merges by hand, to see that a selection is applied to rows of any width."""

    def select(self, vision: VisionOutput) -> Selection:
        first = int(vision.has_cls)
        place = torch.arange(9).add(first).expand(len(vision.hidden), -1)
        merge = torch.full(vision.hidden.shape[:2], -1)
        merge[:, first + 9 : first + 12] = 2
        return Selection(place, merge)


def test_a_selection_is_linear_in_rows_of_any_width() -> None:
    generator = torch.Generator().manual_seed(0)
    vision = VisionOutput(torch.randn(2, 26, 4, generator=generator), True, (5, 5))
    method = Doubled(BUDGET)
    selection = method.select(vision)
    planes = [torch.randn(2, 26, width, generator=generator) for width in (3, 3)]
    combined = [method.combine(plane, selection) for plane in planes]
    assert combined[0].shape == (2, 9, 3)
    torch.testing.assert_close(method.combine(planes[0] + 2 * planes[1], selection), combined[0] + 2 * combined[1])
    torch.testing.assert_close(combined[0][:, 2], planes[0][:, 3] + planes[0][:, 10:13].mean(dim=1))
    assert torch.equal(combined[0][:, 3], planes[0][:, 4])


@each_family
def test_only_the_familys_own_inputs_are_taken(family) -> None:
    adapter, inputs = vzip.CompressedVlm(family.build(), vzip.Identity()).adapter, family.inputs(1)
    with pytest.raises(PromptError, match=r"pixel_value: no input of .*did you mean 'pixel_values'"):
        adapter.read_inputs(pixel_value=inputs[family.pixels_name])
    if not adapter.has_video:
        with pytest.raises(UnsupportedModelError, match=re.escape(adapter.why_no_video)):
            adapter.read_inputs(pixel_values_videos=torch.zeros(1, 1, 3, 8, 8))
    if "image_sizes" not in adapter.input_names:
        with pytest.raises(PromptError, match="image_sizes: no input of"):
            adapter.read_inputs(**inputs, image_sizes=torch.tensor([[5, 5]]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"place": lambda p: p.flip(1)}, "must ascend, each once"),
        ({"place": lambda p: p.clamp(max=3)}, "must ascend, each once"),
        ({"place": lambda p: p + 20}, "must be units, 0 to 25"),
        ({"merge": lambda m: m + 60}, "must be -1 or a token that others join, 0 to 8"),
        ({"merge": lambda m: m.clamp(min=0)}, "must be -1 where a token's own unit is"),
        ({"merge": lambda m: m[:, :5]}, "merge_index has shape"),
        ({"place": lambda p: p.float()}, "place_index is torch.float32"),
    ],
)
def test_a_selection_that_breaks_its_promise_is_refused(wrong, message) -> None:
    class Broken(Doubled):
        def select(self, vision: VisionOutput) -> Selection:
            right = super().select(vision)
            place = wrong.get("place", lambda p: p)(right.place_index)
            return Selection(place, wrong.get("merge", lambda m: m)(right.merge_index))

    vision = VisionOutput(torch.randn(2, 26, 4), True, (5, 5))
    assert Doubled(BUDGET)(vision).num_tokens == 9
    with pytest.raises((RuntimeError, ValueError), match=message):
        Broken(BUDGET)(vision)


def test_a_score_of_patches_alone_or_of_no_numbers_is_refused() -> None:
    class Patches(NewestFirst):
        def score(self, vision: VisionOutput) -> torch.Tensor:
            return super().score(vision)[:, 1:]

    class NoNumbers(NewestFirst):
        def score(self, vision: VisionOutput) -> torch.Tensor:
            return super().score(vision) * float("nan")

    vision = VisionOutput(torch.randn(2, 26, 4), True, (5, 5))
    with pytest.raises(ValueError, match=r"score has shape \(2, 25\): must be \(2, 26\), a value for every unit row"):
        Patches(BUDGET)(vision)
    with pytest.raises(RuntimeError, match=r"NoNumbers\.score is NaN"):
        NoNumbers(BUDGET)(vision)


def test_what_is_no_budget_no_tensor_and_no_method_is_named() -> None:
    vlm = vzip.load_vlm("vzip/tiny", compressor=vzip.VisionZip(vzip.TokenBudget(54, 10)))
    image = Image.new("RGB", (336, 336))
    for call, error, message in (
        (lambda: vzip.VisionZip(64), ConfigError, r"budget=64: must be vzip\.TokenBudget\(num_dominant=54"),
        (lambda: vzip.DivPrune(64), ConfigError, r"budget=64: must be vzip\.TokenBudget"),
        (
            lambda: vzip.load_vlm("vzip/tiny", compressor="visionzip"),
            ConfigError,
            "must be an instance of vzip.Compressor",
        ),
        (lambda: vlm.encode_images(image), PromptError, "pixel_values is a Image: must be a tensor"),
        (lambda: vlm.generate({"input_ids": 1}), PromptError, r"input_ids is a dict.*handed on as \*\*inputs"),
        (lambda: vlm.build_inputs(["<image>"], [image]), PromptError, "a list with a list for each prompt"),
        (lambda: vlm.build_inputs("<image>", [[image]]), PromptError, "texts is a list of prompts"),
    ):
        with pytest.raises(error, match=message):
            call()
    for name, value in (("scope", "imag"), ("space", "tower "), ("merge_rule", "avg")):
        with pytest.raises(TypeError, match=f"{name}=.*must be one of"):
            type("Bad", (Doubled,), {name: value})
