"""Position ids of visual tokens: those of their places (``original``) or counted anew (``repacked``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tests import tiny, tiny_qwen
from tests.families import FAMILIES

import vzip
from vzip.errors import ConfigError, PromptError

BUDGET = vzip.TokenBudget(7, 3)
IMAGE = tiny.IMAGE_TOKEN
METHODS = [
    vzip.VisionZip(BUDGET),
    vzip.DivPrune(BUDGET),
    vzip.MergeDropped(vzip.FasterVLM(BUDGET)),
    vzip.Pooled(vzip.TokenBudget(12, 4)),
]


def prompt_of(family: Any, *rows: list[int]) -> dict[str, torch.Tensor]:
    """Prompts where 0 stands for an image, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), 3)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor([family.token if i == 0 else i for i in row])
        mask[number, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def vanilla_ids(row: list[int], lengths: list[int]) -> list[tuple[int | None, int]]:
    """By a plain loop: for each position of the uncompressed prompt its image (None: text) and place in it."""
    found: list[tuple[int | None, int]] = []
    numbers = iter(range(len(lengths)))
    for token in row:
        if token == 0:
            number = next(numbers)
            found += [(number, place) for place in range(lengths[number])]
        else:
            found.append((None, token))
    return found


def test_two_images_by_hand() -> None:
    """A tower of 64 patches and CLS; six tokens of each image: CLS, four patches, one contextual token."""
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(vzip.TokenBudget(5, 1)), positions="original")
    ids, pixels = torch.tensor([[5, IMAGE, 6, 7, IMAGE, 8]]), tiny.pixels(2)
    prepared = vlm.prepare(ids, pixel_values=pixels)
    visual = vlm.adapter.read_inputs(pixel_values=pixels)
    ((_, vision),) = vlm.adapter.image_outputs(visual, vlm.compressor.reads())
    units = vlm.compressor(vision).places
    # Text at 0; image at 1..64; text at 65 and 66; image at 67..130; text at 131.
    first, second = (sorted(max(unit - 1, 0) for unit in of_image) for of_image in units.tolist())
    assert first[0] == 0 and first != second
    wanted = [0, *(1 + p for p in first), 65, 66, *(67 + p for p in second), 131]
    assert prepared.position_ids.tolist() == [wanted]
    assert vlm.positions == "original" and prepared.num_visual_tokens == [6, 6]
    again = vzip.CompressedVlm(vlm.model, vlm.compressor)
    assert again.positions == "repacked"
    assert again.prepare(ids, pixel_values=pixels).position_ids.tolist() == [list(range(16))]


def test_rows_stand_in_the_order_of_their_places() -> None:
    model = tiny.llava()
    kept = {
        name: vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), positions=name).encode_images(tiny.pixels(1))[0]
        for name in ("original", "repacked")
    }
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), positions="original")
    ((_, vision),) = vlm.adapter.image_outputs(
        vlm.adapter.read_inputs(pixel_values=tiny.pixels(1)), vlm.compressor.reads()
    )
    order = vlm.compressor(vision).places[0].sub(1).clamp(min=0).argsort(stable=True)
    assert order.tolist() != sorted(order.tolist()), "the contextual tokens stand among the others"
    torch.testing.assert_close(kept["original"], kept["repacked"][order])


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_everything_kept_equals_stock_bit_for_bit(family: Any) -> None:
    for kind in family.kinds:
        model = family.build(*kind)
        vlm = vzip.CompressedVlm(model, vzip.Identity(), positions="original")
        inputs = family.inputs(2)
        rows = [[5, 0, 6, 7], [8, 9, 0, 10, 11, 12]]
        lengths = family.stock_lengths(model, inputs)
        whole = [[t for i in row for t in ([0] * n if i == 0 else [i])] for row, n in zip(rows, lengths, strict=True)]
        expanded = prompt_of(family, *whole)
        for number in range(2):  # in a padded batch stock's forward numbers the padding too
            own = tiny.some_of(inputs, number, number + 1)
            wanted = model(**prompt_of(family, whole[number]), **family.stock(own)).logits
            got = vlm(**prompt_of(family, rows[number]), **own).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        asked = {"max_new_tokens": 4, "do_sample": False}
        stock = model.generate(**expanded, **family.stock(inputs), **asked)[:, expanded["input_ids"].shape[1] :]
        assert vlm.generate(**prompt_of(family, *rows), **inputs, **asked).tolist() == stock.tolist()


@pytest.mark.parametrize("compressor", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_against_the_model_itself_in_a_batch_and_step_by_step(family: Any, compressor: vzip.Compressor) -> None:
    model = family.build()
    vlm = vzip.CompressedVlm(model, compressor, positions="original")
    inputs, rows = family.inputs(3), [[5, 0, 6, 0, 7, 8], [9, 10, 0, 11]]
    lengths = family.stock_lengths(model, inputs)
    visual = vlm.adapter.read_inputs(**inputs)
    tokens = vlm.adapter.encode(visual, compressor)
    batch = prompt_of(family, *rows)
    answers = vlm.generate(**batch, **inputs, max_new_tokens=5, do_sample=False)
    beams = vlm.generate(**batch, **inputs, max_new_tokens=4, do_sample=False, num_beams=2)
    logits = vlm(**batch, **inputs).logits
    first = 0
    for row, of_row in ((0, 2), (1, 1)):
        own = tokens[first : first + of_row]
        places = [each.place_index.tolist() for each in own]  # type: ignore[union-attr]
        assert all(place == sorted(place) for place in places)
        embeds, position_ids = [], []
        left = [list(zip(place, each.rows, strict=True)) for place, each in zip(places, own, strict=True)]
        for position, (image, at) in enumerate(vanilla_ids(rows[row], lengths[first : first + of_row])):
            if image is None:
                embeds.append(vlm.adapter.embed_tokens(torch.tensor(at)))
                position_ids.append(position)
            else:  # several tokens may have one place: CLS and the first patch, what is cut off and what is not
                here = [each for place, each in left[image] if place == at]
                embeds += here
                position_ids += [position] * len(here)
        keeps_all = [len(each.rows) for each in own] == lengths[first : first + of_row]  # a video's few pooled units
        assert keeps_all or position_ids != list(range(len(position_ids)))
        embedded = torch.stack(embeds)[None]
        for step in range(5):
            ids = torch.tensor([position_ids])
            mask = torch.ones_like(ids)
            out = model(inputs_embeds=embedded, position_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            if step == 0:
                torch.testing.assert_close(logits[row, -len(out) :], out, rtol=1e-4, atol=1e-4)
            assert int(out[-1].argmax()) == int(answers[row, step])
            embedded = torch.cat([embedded, vlm.adapter.embed_tokens(answers[row, step])[None, None]], dim=1)
            position_ids.append(position_ids[-1] + 1)
        single = {key: value[row : row + 1, -len(rows[row]) :] for key, value in batch.items()}
        images = tiny.some_of(inputs, first, first + of_row)
        assert vlm.generate(**single, **images, max_new_tokens=5, do_sample=False).tolist() == [answers[row].tolist()]
        alone = vlm.generate(**single, **images, max_new_tokens=4, do_sample=False, num_beams=2)
        assert alone.tolist() == [beams[row].tolist()]
        first += of_row


@pytest.mark.parametrize("options", [{}, {"row_newline": True}, {"row_newline": True, "drop_padding": True}], ids=str)
@torch.no_grad()
def test_tiles_and_newlines_by_a_plain_loop(options: dict[str, bool]) -> None:
    """LLaVA-NeXT: each kept patch at the place that whole_index gives it; cut-off ones at the nearest that is left."""
    model = tiny.llava_next()
    vlm = vzip.CompressedVlm(model, vzip.DominantOnly(vzip.TokenBudget(20, 0)), positions="original", **options)
    adapter: Any = vlm.adapter
    inputs = tiny.next_inputs(4)
    visual = adapter.read_inputs(**inputs)
    ((_, vision),) = adapter.image_outputs(visual, vlm.compressor.reads())
    units = vlm.compressor(vision).source_index.tolist()
    crop = 0
    for shape, tokens in zip(visual.images, adapter.encode(visual, vlm.compressor), strict=True):
        index = adapter.whole_index(shape).tolist()
        shown = {flat: place for place, flat in enumerate(index) if flat >= 0}
        grid_cols, wanted = shape.tiles[1], []
        for number in range(shape.num_crops):
            for unit in units[crop + number]:
                if unit == 0:
                    wanted.append(0)
                    continue
                flat = number * 64 + unit - 1
                if flat in shown or number == 0:
                    wanted.append(shown[flat])
                    continue

                def at(flat: int) -> tuple[int, int]:
                    tile, patch = divmod(flat - 64, 64)
                    return tile // grid_cols * 8 + patch // 8, tile % grid_cols * 8 + patch % 8  # noqa: B023

                y, x = at(flat)
                distance = {abs(at(f)[0] - y) + abs(at(f)[1] - x): p for f, p in shown.items() if f >= 64}
                wanted.append(distance[min(distance)])
        crop += shape.num_crops
        newlines = [place for place, flat in enumerate(index) if flat < 0]
        got = tokens.place_index.tolist()
        if options.get("drop_padding"):
            # Rows that show some of the image, and those that Hugging Face leaves, may differ by a row at the edges.
            assert set(got) - set(wanted) == set(newlines)
        elif options:
            assert set(newlines) <= set(got) and len(got) == len(wanted) + shape.num_added
        else:
            assert got == sorted(wanted)
        newline = adapter.newline(tokens.rows)
        is_newline = [bool(torch.equal(row, newline)) for row in tokens.rows]
        assert {place for place, is_one in zip(got, is_newline, strict=True) if is_one} == set(
            newlines if options else []
        )


@torch.no_grad()
def test_a_dialogue_equals_one_pass_over_it() -> None:
    model = tiny.llava(vocab_size=320)
    answers: dict[str, list[str]] = {}
    for positions in ("original", "repacked"):
        vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), tiny.processor(), positions=positions)
        shades = [Image.new("RGB", (60, 90), shade) for shade in ("red", "blue")]
        chat = vlm.chat()
        answers[positions] = [
            chat.ask("what is it?", [shades[0]], max_new_tokens=6),
            chat.ask("and it?", max_new_tokens=6),
            chat.ask("it?", [shades[1]], max_new_tokens=6),
        ]
        # Without a cache the whole dialogue is one prompt.
        texts = [m["content"] for m in chat.messages[:-1]]
        assert len(texts) == 5
        text = vlm.processor.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, tokenize=False)
        inputs = vlm.build_inputs([text], [shades])
        new = vlm.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert vlm.processor.tokenizer.decode(new[0], skip_special_tokens=True).strip() == answers[positions][-1]
    assert answers["original"] != answers["repacked"], "they are different models"


@torch.no_grad()
def test_qwen_repacked_counts_on_every_axis() -> None:
    model = tiny_qwen.build()
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(vzip.TokenBudget(4, 2)), positions="repacked")
    images = tiny_qwen.images("6x10", "4x4")
    prompts = tiny_qwen.batch(tiny_qwen.prompt(5, "6x10", 7, 8), tiny_qwen.prompt(9, "4x4", 3))
    prepared = vlm.prepare(**prompts, **images)
    assert prepared.position_ids.shape[0] == 3
    for row, mask in enumerate(prepared.attention_mask):
        own = prepared.position_ids[:, row, mask.bool()]
        assert own.tolist() == [list(range(own.shape[1]))] * 3
    answers = vlm.generate(**prompts, **images, max_new_tokens=4, do_sample=False)
    embeds, mask, ids = prepared.inputs_embeds, prepared.attention_mask, prepared.position_ids
    for step in range(4):
        logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=False).logits
        assert logits[:, -1].argmax(dim=-1).tolist() == answers[:, step].tolist()
        embeds = torch.cat([embeds, vlm.adapter.embed_tokens(answers[:, step : step + 1])], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ids = torch.cat([ids, ids[..., -1:] + 1], dim=-1)
    assert vzip.CompressedVlm(model, vlm.compressor).positions == "original"


@pytest.mark.parametrize("pruner", [vzip.FastV(K=1, keep=4), vzip.PyramidDrop(layers=(1,), keep=(4,))], ids=str)
@torch.no_grad()
def test_with_a_pruner_on_top_a_batch_equals_singles_and_keeping_all_equals_no_pruner(pruner: vzip.Pruner) -> None:
    model = tiny.llava()
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), pruner=pruner, positions="original")
    given = {"input_ids": torch.tensor([[5, IMAGE, 6, 7], [3, 8, IMAGE, 9]]), "pixel_values": tiny.pixels(2)}
    given["attention_mask"] = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    answers = vlm.generate(**given, max_new_tokens=4, do_sample=False)
    for row in range(2):
        mask = given["attention_mask"][row].bool()
        single = {
            "input_ids": given["input_ids"][row, mask][None],
            "pixel_values": given["pixel_values"][row : row + 1],
        }
        assert vlm.generate(**single, max_new_tokens=4, do_sample=False)[0].tolist() == answers[row].tolist()
    keeping = vzip.CompressedVlm(model, vlm.compressor, pruner=vzip.FastV(K=1, keep=1.0), positions="original")
    plain = vzip.CompressedVlm(model, vlm.compressor, positions="original")
    asked = {"max_new_tokens": 4, "do_sample": False}
    assert keeping.generate(**given, **asked).tolist() == plain.generate(**given, **asked).tolist()


def test_what_cannot_be_is_refused() -> None:
    model = tiny.llava()
    with pytest.raises(ConfigError, match=r"model.positions='orginal'.*did you mean 'original'"):
        vzip.CompressedVlm(model, vzip.Identity(), positions="orginal")  # type: ignore[arg-type]
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), positions="original")
    with pytest.raises(PromptError, match="ends in an image"):
        vlm.generate(torch.tensor([[5, IMAGE]]), pixel_values=tiny.pixels(1), max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"flash_attention_2: flash attention reads a gap"):
        vzip.load_vlm("vzip/tiny", positions="original", attn_implementation="flash_attention_2")
    # 20 images of 64 patches fit once compressed; 33 of them have 2112 positions, more than the 2048 that are read.
    many = torch.tensor([[5, IMAGE] * 33 + [6]])
    with pytest.raises(
        PromptError, match=r"is 2146 tokens long \(positions=original: dropped tokens count\).*repacked"
    ):
        vlm.prepare(many, pixel_values=tiny.pixels(33))
    assert vzip.CompressedVlm(model, vlm.compressor).prepare(many, pixel_values=tiny.pixels(33)) is not None
    with pytest.raises(PromptError, match=r"answer up to 2000"):
        vlm.generate(torch.tensor([[5, IMAGE, 6]]), pixel_values=tiny.pixels(1), max_new_tokens=2000)
