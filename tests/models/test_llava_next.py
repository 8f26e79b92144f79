"""LLaVA-NeXT: packing against a plain loop, its options, counts, the processor's way, and bad input."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tests import tiny
from tests.tiny import IMAGE_TOKEN, NEXT_CROPS

import vzip
from vzip.compressors import VisionShape
from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.models.families.llava_next.adapter import LlavaNextAdapter
from vzip.results.token_count import TokenCountError, check_token_counts

BUDGET = vzip.TokenBudget(num_dominant=20, num_contextual=3)
IDS = torch.tensor([[5, IMAGE_TOKEN, 6]])


@pytest.fixture(scope="module")
def model():
    return tiny.llava_next(vocab_size=320)


def wrapped(model, compressor=None, **options):
    return vzip.CompressedVlm(model, compressor or vzip.VisionZip(BUDGET), tiny.next_processor(), **options)


def packed_by_a_loop(vlm, inputs, number, grid, newline_rows=()):
    """One image's visual tokens, written out: base crop, lines of patches through all tiles, CLS, contextual."""
    crops = inputs["pixel_values"][number, : 1 + grid[0] * grid[1]]
    visual = vlm.adapter.read_inputs(**{name: value[number : number + 1] for name, value in inputs.items()})
    vision = vlm.adapter.image_output(visual, vlm.compressor.reads())
    compressed = vlm.compressor(vision)
    tokens, kept = vlm.adapter.projector(compressed.tokens), compressed.source_index.tolist()
    first_patch = int(vision.has_cls)
    out = list(tokens[0])
    for row in range(grid[0] * 8):
        for col in range(grid[1] * 8):
            tile = 1 + row // 8 * grid[1] + col // 8
            patch = row % 8 * 8 + col % 8 + first_patch
            if patch in kept[tile]:
                out.append(tokens[tile, kept[tile].index(patch)])
        if row in newline_rows:
            out.append(vlm.model.model.image_newline)
    out += [tokens[tile, 0] for tile in range(1, len(crops)) if first_patch and kept[tile][:1] == [0]]
    out += [token for tile in range(1, len(crops)) for token in tokens[tile, len(kept[0]) :]]
    return torch.stack(out)


GRIDS = [(2, 2), (1, 3), (2, 1), (2, 2)]
COMPRESSORS = [
    vzip.VisionZip(BUDGET),
    vzip.VisionZip(vzip.TokenBudget(5, 0)),
    vzip.DominantOnly(BUDGET),
    vzip.RandomTokens(BUDGET),
    vzip.ContextualOnly(BUDGET),
]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@torch.no_grad()
def test_packing_equals_a_plain_loop(model, compressor):
    vlm, inputs = wrapped(model, compressor), tiny.next_inputs(4)
    images = vlm.encode_images(**inputs)
    for number, (image, grid) in enumerate(zip(images, GRIDS, strict=True)):
        torch.testing.assert_close(image, packed_by_a_loop(vlm, inputs, number, grid), rtol=0, atol=1e-5)
        assert len(image) == compressor.budget.num_tokens * NEXT_CROPS[number]


@torch.no_grad()
def test_a_tower_without_cls():
    vlm, inputs = wrapped(tiny.llava_next("siglip", "full", vocab_size=320)), tiny.next_inputs(2)
    for number, image in enumerate(vlm.encode_images(**inputs)):
        expected = packed_by_a_loop(vlm, inputs, number, GRIDS[number])
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_given_tile_grid_decides_the_reading_order(model):
    vlm, inputs = wrapped(model), tiny.some_of(tiny.next_inputs(3), 2, 3)
    stock = vlm.encode_images(**inputs)[0]
    inputs["tile_grids"] = torch.tensor([[1, 2]])
    across = vlm.encode_images(**inputs)[0]
    torch.testing.assert_close(across, packed_by_a_loop(vlm, inputs, 0, (1, 2)), rtol=0, atol=1e-5)
    assert across.shape == stock.shape and not torch.equal(across, stock)


@torch.no_grad()
def test_row_newline_ends_every_line(model):
    vlm, inputs = wrapped(model, row_newline=True), tiny.next_inputs(2)
    for number, image in enumerate(vlm.encode_images(**inputs)):
        rows = range(GRIDS[number][0] * 8)
        expected = packed_by_a_loop(vlm, inputs, number, GRIDS[number], rows)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
        assert len(image) == 23 * NEXT_CROPS[number] + len(rows)


def stitched_patches(vlm, inputs):
    """(rows, cols) in the 2 x 2 grid of the patches kept of image 0's tiles."""
    vision = vlm.adapter.image_output(vlm.adapter.read_inputs(**inputs), vlm.compressor.reads())
    patches = vlm.compressor(vision).source_index[1:, 1:] - 1
    tile = torch.arange(4)[:, None]
    return tile // 2 * 8 + patches // 8, tile % 2 * 8 + patches % 8, vision.valid


@torch.no_grad()
def test_drop_padding_selects_no_patch_of_mere_padding(model):
    # 180 x 240 on 224 x 224: scaled by 14/15 to 168 x 224, so 28 rows of padding above and below: two rows of patches.
    inputs = tiny.some_of(tiny.next_inputs(4), 3, 4)
    plain, strict = wrapped(model), wrapped(model, drop_padding=True)
    rows, _, valid = stitched_patches(plain, inputs)
    assert ((rows < 2) | (rows >= 14)).any() and valid is None  # the published code keeps padding here
    rows, _, valid = stitched_patches(strict, inputs)
    assert rows.min() >= 2 and rows.max() < 14
    assert valid[0].all() and valid[1:, 0].all()  # the base crop has no padding, and CLS is none
    image = strict.encode_images(**inputs)[0]
    assert len(image) == 5 * 23
    torch.testing.assert_close(image, packed_by_a_loop(strict, inputs, 0, (2, 2)), rtol=0, atol=1e-5)
    both = wrapped(model, drop_padding=True, row_newline=True)
    expected = packed_by_a_loop(both, inputs, 0, (2, 2), range(2, 14))
    torch.testing.assert_close(both.encode_images(**inputs)[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_drop_padding_beside_a_tall_image(model):
    inputs = tiny.some_of(tiny.next_inputs(4), 3, 4) | {"image_sizes": torch.tensor([[240, 180]])}
    _, cols, _ = stitched_patches(wrapped(model, drop_padding=True), inputs)
    assert cols.min() >= 2 and cols.max() < 14


def test_options_are_off_by_default_and_refused_where_they_mean_nothing(model):
    assert wrapped(model).adapter.options == type(wrapped(model).adapter.options)(drop_padding=False, row_newline=False)
    with pytest.raises(ConfigError, match=r"row_newline=True.*has no tiles"):
        vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET), row_newline=True)
    with pytest.raises(ConfigError, match=r"drop_padding=True.*RandomTokens does not select by attention"):
        wrapped(model, vzip.RandomTokens(BUDGET), drop_padding=True)
    wrapped(model, vzip.Identity(), drop_padding=True, row_newline=True)  # the unmodified model does both


@torch.no_grad()
def test_a_single_crop_gets_a_newline_as_in_the_published_code(model):
    inputs = {"pixel_values": tiny.next_inputs(2)["pixel_values"][:, :1], "image_sizes": torch.tensor([[90, 90]] * 2)}
    for compressor, count in [(vzip.VisionZip(BUDGET), 24), (vzip.Identity(), 65)]:
        vlm = wrapped(model, compressor)
        images = vlm.encode_images(**inputs)
        assert [len(image) for image in images] == [count, count]
        assert all(torch.equal(image[-1], model.model.image_newline) for image in images)
        assert vlm.generate(IDS, max_new_tokens=2, **tiny.some_of(inputs, 0, 1)).shape == (1, 2)


@pytest.mark.parametrize(("dominant", "contextual", "total"), [(27, 5, 160), (54, 10, 320), (108, 20, 640)])
def test_the_papers_budgets_are_per_crop(dominant, contextual, total):
    budget = vzip.TokenBudget(dominant, contextual)
    assert budget.num_tokens * 5 == total
    with pytest.raises(ConfigError, match=r"per crop.*577 to choose from.*for each crop"):
        vzip.VisionZip(vzip.TokenBudget(540, 100)).num_tokens(VisionShape("image", 5, (24, 24), True, 2880))


def test_text_and_images_to_answers_by_both_rules(model):
    pictures = [Image.new("RGB", (100, 60), "red"), Image.linear_gradient("L").resize((330, 100)).convert("RGB")]
    for rule, keys in [("llava", {"image_sizes", "tile_grids"}), ("hf", {"image_sizes"})]:
        vlm = wrapped(model, preprocess=rule)
        inputs = vlm.build_inputs(["<image> and <image>?", "hello"], [pictures, []])
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"} | keys
        assert inputs["image_sizes"].tolist() == [[60, 100], [100, 330]]
        assert vlm.generate(max_new_tokens=3, do_sample=False, **inputs).shape == (2, 3)
        assert vlm.last_num_visual_tokens == [3 * 23, 4 * 23]


def test_the_processors_own_call_equals_stock(model):
    """Images with ties and padding, prompts as the Hugging Face processor expands them."""
    vlm = wrapped(model, vzip.Identity(), preprocess="hf")
    pictures = [Image.linear_gradient("L").resize(size).convert("RGB") for size in [(100, 60), (50, 50), (300, 220)]]
    theirs = vlm.processor(text=["<image> a <image> b <image> c"], images=pictures, return_tensors="pt")
    with torch.no_grad():
        stock = model(**theirs).logits
        ours = vlm.forward(**theirs).logits
        built = vlm.forward(**vlm.build_inputs(["<image> a <image> b <image> c"], [pictures])).logits
    assert torch.equal(ours, stock) and torch.equal(built, stock)


@torch.no_grad()
def test_a_saved_checkpoint_comes_back_with_its_processor(model, tmp_path):
    model.save_pretrained(tmp_path)
    tiny.next_processor().save_pretrained(tmp_path)
    vlm = vzip.load_vlm(tmp_path, compressor=vzip.VisionZip(BUDGET))
    assert isinstance(vlm.adapter, LlavaNextAdapter)
    inputs = vlm.build_inputs(["<image> hm?"], [[Image.linear_gradient("L").resize((200, 150)).convert("RGB")]])
    assert torch.equal(vlm.forward(**inputs).logits, wrapped(model).forward(**inputs).logits)


def test_bad_input_is_named(model):
    vlm, inputs = wrapped(model), tiny.next_inputs(2)
    ids = torch.tensor([[5, IMAGE_TOKEN, IMAGE_TOKEN]])
    values, sizes = inputs["pixel_values"], inputs["image_sizes"]
    cases = [
        ({"pixel_values": values}, r"image_sizes is missing for 2 images"),
        ({"pixel_values": values, "image_sizes": sizes[:1]}, r"image_sizes has shape \(1, 2\) for 2 images"),
        ({"pixel_values": values, "image_sizes": sizes * 0}, r"must be at least 1"),
        ({"pixel_values": values[:, 0], "image_sizes": sizes}, r"\[images, max_crops, 3, height, width\]"),
        ({"pixel_values": values[:, :3], "image_sizes": sizes}, r"Image 0 has 3 crops.*224 x 224.*asks for 5"),
        ({"pixel_values": values, "image_sizes": sizes.flip(0)}, r"Image 0 has 5 crops.*asks for 4.*1 x 3 tiles"),
        ({**inputs, "tile_grids": torch.tensor([[2, 2], [2, 2]])}, r"Image 1 has 4 crops.*asks for 5"),
        ({**inputs, "tile_grids": torch.tensor([2, 2])}, r"tile_grids has shape \(2,\)"),
    ]
    for wrong, message in cases:
        with pytest.raises(PromptError, match=message):
            vlm.prepare(ids, **wrong)


def test_settings_that_stock_cannot_run_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"vision_feature_select_strategy=full.*needs 'default'"):
        vzip.CompressedVlm(tiny.llava_next("clip", "full"), vzip.Identity())
    config = tiny.llava_next().config
    config.image_grid_pinpoints = [[112, 200]]
    with pytest.raises(UnsupportedModelError, match=r"112, 200.*multiple of the vision tower's 112"):
        LlavaNextAdapter.check_config(config)


@pytest.mark.parametrize("options", [{}, {"row_newline": True}, {"row_newline": True, "drop_padding": True}], ids=str)
def test_the_evaluations_count_check_agrees_and_sees_a_difference(model, options):
    for compressor in (vzip.VisionZip(BUDGET), vzip.Identity()):
        vlm, inputs = wrapped(model, compressor, **options), tiny.next_inputs(4)
        counts = [len(image) for image in vlm.encode_images(**inputs)]
        vlm.last_num_visual_tokens = list(counts)
        assert check_token_counts(vlm, inputs, [1, 3], [0, 0]) == [counts[:1], counts[1:]]
        vlm.last_num_visual_tokens[2] += 1
        with pytest.raises(TokenCountError, match=str(counts[2])):
            check_token_counts(vlm, inputs, [1, 3], [0, 0])


@pytest.mark.parametrize("rule", ["llava", "hf"])
def test_black_tiles_that_are_not_normalised_are_tiles(rule):
    processor = tiny.next_processor()
    processor.image_processor.do_normalize = False
    vlm = vzip.CompressedVlm(tiny.llava_next(vocab_size=320), vzip.Identity(), processor, preprocess=rule)
    black_below = Image.new("RGB", (224, 224), "white")
    black_below.paste("black", (0, 100, 224, 224))
    prepared = vlm.preprocess_images([black_below, Image.new("RGB", (100, 330), "white")])
    assert not prepared["pixel_values"][0, 3:].any()
    assert [len(tokens) for tokens in vlm.encode_images(**prepared)] == vlm.expected_num_visual_tokens(**prepared)
