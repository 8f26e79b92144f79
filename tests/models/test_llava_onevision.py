"""LLaVA-OneVision: tiles, several images and videos as stock has them; pooling, newlines and scores by other ways."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from tests import tiny
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN
from transformers import LlavaOnevisionImageProcessor

import vzip
from vzip.compressors import Signal
from vzip.errors import PromptError, UnsupportedModelError
from vzip.models.families import LlavaOnevisionAdapter
from vzip.models.families.llava_onevision.adapter import _pool
from vzip.models.weights.from_config import new_image_processor

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


@pytest.fixture(scope="module")
def model():
    return tiny.llava_onevision()


def wrapped(model, compressor=None, **options):
    return vzip.CompressedVlm(model, compressor or vzip.VisionZip(BUDGET), **options)


@pytest.fixture(scope="module")
def asked():
    """A wrapper with a processor, and images."""
    model, processor = tiny.llava_onevision(vocab_size=320, video_token=5), tiny.onevision_processor()
    drawn = [Image.effect_noise(size, 90).convert("RGB") for size in ((300, 180), (130, 240), (224, 224))]
    return vzip.CompressedVlm(model, vzip.Identity(), processor), drawn


def bilinear(cells: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """``[h, w, E]`` -> ``[rows, cols, E]`` by a plain loop: each new cell's middle among the old cells' middles."""
    height, width = cells.shape[:2]

    def around(number: int, few: int, many: int) -> tuple[int, int, float]:
        at = max((number + 0.5) * many / few - 0.5, 0.0)
        below = int(at)
        return below, min(below + 1, many - 1), at - below

    made = cells.new_zeros(rows, cols, cells.shape[2])
    for row in range(rows):
        for col in range(cols):
            top, bottom, down = around(row, rows, height)
            left, right, across = around(col, cols, width)
            above = cells[top, left] * (1 - across) + cells[top, right] * across
            under = cells[bottom, left] * (1 - across) + cells[bottom, right] * across
            made[row, col] = above * (1 - down) + under * down
    return made


@pytest.mark.parametrize("kept", ["one", "several"])
@torch.no_grad()
def test_images_and_videos_in_one_prompt_equal_stock(model, kept) -> None:
    vlm = wrapped(model, vzip.Identity())
    images, videos = tiny.next_inputs(3), tiny.video_inputs(2, seed=1)
    images["batch_num_images"] = torch.tensor([1, 2])
    images["pixel_values"][1:, 1:] = 0  # of several images each is one crop
    lengths = [len(each) for each in model.model.get_image_features(**images).pooler_output]
    assert lengths[1:] == [65, 65] and lengths[0] == 64 + 13 * 14  # 16 rows and columns are shrunk to 13
    one, first, second = ([IMAGE_TOKEN] * length for length in lengths)
    video = [VIDEO_TOKEN] * (3 * 16 + 1)
    rows = [[5, *video, 6, *one, 7], [*first, *second, 9, *video, 8]]
    longest = max(map(len, rows))
    ids = torch.tensor([[3] * (longest - len(row)) + row for row in rows])
    mask = (ids != 3).long()
    inputs = {**images, **videos}
    prepared = vlm.prepare(ids, mask, **inputs)
    stock = model(input_ids=ids, attention_mask=mask, position_ids=prepared.position_ids, **inputs).logits
    assert torch.equal(vlm.forward(ids, mask, **inputs).logits[mask.bool()], stock[mask.bool()])
    new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **inputs)
    short = torch.tensor([[3, 5, VIDEO_TOKEN, 6, IMAGE_TOKEN, 7], [IMAGE_TOKEN, IMAGE_TOKEN, 9, VIDEO_TOKEN, 8, 3]])
    ours = vlm.generate(short, (short != 3).long(), max_new_tokens=5, do_sample=False, **inputs)
    assert torch.equal(ours, new[:, longest:])


@torch.no_grad()
def test_pooling_shrinking_and_newlines_by_plain_loops(model) -> None:
    vlm = wrapped(model.double(), vzip.Identity())
    adapter, newline = vlm.adapter, model.model.image_newline
    frames = tiny.pixels(2).double()
    rows = adapter.projector(vlm.adapter.run_tower(adapter.tower, frames, frozenset(), 0).hidden)
    pooled = [bilinear(frame.view(8, 8, -1), 4, 4).flatten(0, 1) for frame in rows]
    (video,) = vlm.encode_videos(frames[None])
    torch.testing.assert_close(video, torch.cat([*pooled, newline[None]]))
    odd = torch.randn(1, 25, 3, dtype=torch.float64)
    torch.testing.assert_close(_pool(odd, (5, 5))[0], bilinear(odd.view(5, 5, 3), 3, 3).flatten(0, 1))

    inputs = tiny.next_inputs(4)  # the last one: 180 x 240 pixels on 2 x 2 tiles, padding above and below
    inputs = {name: value[3:] for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    crops = adapter.image_crops(adapter.read_inputs(**inputs))
    rows = adapter.projector(adapter.run_tower(adapter.tower, crops, frozenset(), 0).hidden)
    mosaic = torch.stack([rows[1 + 2 * (y // 8) + x // 8, y % 8 * 8 + x % 8] for y in range(2, 14) for x in range(16)])
    ratio = math.sqrt(12 * 16 / (3 * 64))
    assert ratio <= 1.1, "an image that is not shrunk"
    lines = [torch.cat([line, newline[None]]) for line in mosaic.view(12, 16, -1)]
    torch.testing.assert_close(vlm.encode_images(**inputs)[0], torch.cat([rows[0], *lines]))

    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in tiny.next_inputs(1).items()
    }
    crops = adapter.image_crops(adapter.read_inputs(**inputs))
    rows = adapter.projector(adapter.run_tower(adapter.tower, crops, frozenset(), 0).hidden)
    mosaic = torch.stack([rows[1 + 2 * (y // 8) + x // 8, y % 8 * 8 + x % 8] for y in range(16) for x in range(16)])
    lines = [torch.cat([line, newline[None]]) for line in bilinear(mosaic.view(16, 16, -1), 13, 13)]
    torch.testing.assert_close(vlm.encode_images(**inputs)[0], torch.cat([rows[0], *lines]))
    model.float()


@torch.no_grad()
def test_scores_are_the_attention_that_the_last_layer_records(model) -> None:
    """Received attention by the stock tower's own eager maps; a video's pooled as its rows are."""
    vlm, videos = wrapped(model), tiny.video_inputs(1)
    adapter, frames = vlm.adapter, videos["pixel_values_videos"][0]
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    maps = tower(frames, output_attentions=True).attentions[-1]  # [frames, heads, query, key]
    tower.set_attn_implementation(before)
    received = maps.mean(dim=(1, 2))
    vision = adapter.video_output(adapter.read_inputs(**videos), vlm.compressor.reads())
    wanted = torch.stack([bilinear(frame.view(8, 8, 1), 4, 4).flatten() for frame in received])
    torch.testing.assert_close(vision.read(Signal("attention")), wanted, rtol=1e-4, atol=1e-6)
    assert vision.grid == (4, 4) and not vision.has_cls
    pictures = {"pixel_values": frames[:, None], "image_sizes": torch.tensor([[112, 112]] * 3)}
    ((_, vision),) = adapter.image_outputs(adapter.read_inputs(**pictures), vlm.compressor.reads())
    torch.testing.assert_close(vision.read(Signal("attention")), received, rtol=1e-4, atol=1e-6)
    stock = tower(frames, output_hidden_states=True)
    assert torch.equal(vision.hidden, stock.hidden_states[-1])
    assert not torch.equal(vision.hidden, stock.last_hidden_state), "post_layernorm comes behind what is read"


@torch.no_grad()
def test_compressed_crops_are_not_shrunk_and_a_video_ends_in_its_newline(model) -> None:
    newline, inputs = model.model.image_newline, tiny.next_inputs(2)
    vlm = wrapped(model)
    assert [len(each) for each in vlm.encode_images(**inputs)] == [5 * 9, 4 * 9]
    lines = wrapped(model, row_newline=True)
    of_lines = lines.encode_images(**inputs)
    assert [len(each) for each in of_lines] == [5 * 9 + 16, 4 * 9 + 8] == lines.expected_num_visual_tokens(**inputs)
    assert int((of_lines[0] == newline).all(dim=1).sum()) == 16
    (video,) = vlm.encode_videos(**tiny.video_inputs(1))
    assert torch.equal(video[-1], newline) and len(video) == 3 * 9 + 1
    alone = wrapped(model, vzip.VisionZip(vzip.TokenBudget(30, 10)))
    assert len(alone.encode_videos(**tiny.video_inputs(1))[0]) == 3 * 16 + 1, "a budget above a frame's units keeps all"
    several = {**tiny.next_inputs(2), "batch_num_images": torch.tensor([2])}
    several["pixel_values"] = several["pixel_values"][:, :1]
    assert [len(each) for each in vlm.encode_images(**several)] == [10, 10]


def test_places_in_a_shrunk_mosaic_are_those_of_its_cells(model) -> None:
    adapter = wrapped(model).adapter
    for size in ((224, 224), (200, 224)):
        (shape,) = adapter.image_shapes(
            {"pixel_values": torch.ones(1, 5, 3, 112, 112), "image_sizes": torch.tensor([size])}
        )
        index, places = adapter.whole_index(shape), adapter.unit_places(shape, torch.device("cpu")).flatten()
        assert len(index) == shape.num_vanilla
        shown = index >= 0
        assert torch.equal(places[index[shown]], torch.arange(len(index))[shown])
        ends = (~shown).nonzero().flatten()
        assert set(ends.tolist()).isdisjoint(places.tolist())
    lines = wrapped(model, row_newline=True, positions="original").adapter
    (shape,) = lines.image_shapes(
        {"pixel_values": torch.ones(1, 5, 3, 112, 112), "image_sizes": torch.tensor([(224, 224)])}
    )
    assert (
        sorted(set(lines.newline_places(shape).tolist())) == (lines.whole_index(shape) < 0).nonzero().flatten().tolist()
    )


def test_images_are_prepared_as_the_stock_processor_does(asked) -> None:
    vlm, drawn = asked
    stock: LlavaOnevisionImageProcessor = new_image_processor(vlm.model.config)
    vlm.preprocess = "hf"
    alone = vlm.preprocess_images(drawn)
    expected = stock(images=drawn, return_tensors="pt")
    assert torch.equal(alone["pixel_values"], expected["pixel_values"])
    assert torch.equal(alone["image_sizes"], expected["image_sizes"])
    texts, images = ["a <image>", "b <image> <image>"], [drawn[:1], drawn[1:]]
    inputs, expected = vlm.build_inputs(texts, images), stock(images=images, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert vlm.expected_num_visual_tokens(**inputs)[1:] == [65, 65]
    of_stock = {name: expected[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    assert [len(t) for t in vlm.encode_images(**of_stock)] == vlm.expected_num_visual_tokens(**inputs)
    vlm.preprocess = "llava"
    ours = vlm.build_inputs(texts, images)
    assert torch.equal(ours["tile_grids"], inputs["tile_grids"]) and ours["tile_grids"][1:].eq(0).all()
    assert (ours["pixel_values"] - inputs["pixel_values"]).abs().max() < 0.02  # 8 bits between resizing and padding
    frames = vlm.preprocess_videos([drawn[:1] * 2])["pixel_values_videos"]
    assert frames.shape == (1, 8, 3, 112, 112) and torch.equal(frames[0, 0], frames[0, 1])


def test_a_dialogue_shows_images_that_come_together_without_tiles(asked) -> None:
    vlm, drawn = asked
    chat = vlm.chat()
    chat.ask("a", drawn[:2], max_new_tokens=1)
    assert [visual.num_visual_tokens for visual in chat.visuals] == [65, 65]
    chat.ask("b", drawn[:1], max_new_tokens=1)
    assert chat.visuals[2].num_visual_tokens > 65
    assert chat.add_image(drawn[0], 2).num_visual_tokens == 65
    assert chat.add_video(drawn).num_visual_tokens == 8 * 16 + 1


def test_bad_input(model) -> None:
    vlm = wrapped(model)
    with pytest.raises(PromptError, match=r"batch_num_images=\[2, 2\]: must be .* the 3 of pixel_values"):
        vlm.adapter.read_inputs(**tiny.next_inputs(3), batch_num_images=torch.tensor([2, 2]))
    with pytest.raises(PromptError, match=r"Image 0 has 5 crops .* asks for 1: it has no tiles"):
        vlm.encode_images(**tiny.next_inputs(2), batch_num_images=torch.tensor([2]))
    with pytest.raises(PromptError, match="pixel_values_videos has shape"):
        vlm.encode_videos(torch.ones(1, 0, 3, 112, 112))
    config = tiny.llava_onevision().config
    config.vision_aspect_ratio = "pad"
    with pytest.raises(UnsupportedModelError, match="vision_aspect_ratio='pad': must be anyres_max_N"):
        LlavaOnevisionAdapter.check_config(config)
