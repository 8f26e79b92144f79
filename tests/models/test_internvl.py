"""InternVL3: stock Hugging Face bit for bit, pixel shuffle and scores by plain loops, tiles, dialogues, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import make_random_model
from tests import methods, tiny_internvl
from tests.isolation.snapshot import changed, snapshot
from tests.tiny_internvl import IMAGE, UNITS, images, prompt
from tests.tiny_qwen import batch
from transformers import AttentionInterface

import vzip
from vzip.bench.shapes import SHAPES
from vzip.compressors import Signal
from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.models.families import adapter_class_for_config
from vzip.models.families.internvl.processing import prepare_images
from vzip.models.weights.from_config import new_image_processor

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
ROWS = [prompt(5, "5", 7, "1", 8), prompt(9, "3", 10, 11)]
SCORES = ("attention", "received_attention", "undivided_attention", "key_norms")


def stock_inputs(ids, inputs):
    """For the unmodified model, which counts padding among the positions unless it is told."""
    positions = (ids["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return {**ids, "pixel_values": inputs["pixel_values"], "position_ids": positions}


@pytest.mark.parametrize(
    ("dtype", "vision"),
    [(torch.float32, {}), (torch.bfloat16, {"use_qk_norm": True, "norm_type": "rms_norm"})],
    ids=["float32", "bfloat16, qk norm"],
)
@torch.no_grad()
def test_identity_equals_stock_bit_for_bit(dtype, vision):
    model, ids, inputs = tiny_internvl.build(**vision).to(dtype), batch(*ROWS), images(5, 1, 3)
    vlm, valid = vzip.CompressedVlm(model, vzip.Identity()), ids["attention_mask"].bool()
    before = snapshot(model)
    ours = vlm.forward(**ids, **inputs).logits
    told_by_the_prompt = vlm.forward(**ids, pixel_values=inputs["pixel_values"]).logits
    assert vlm.last_num_visual_tokens == [5 * UNITS, UNITS, 3 * UNITS]
    generated = vlm.generate(**ids, **inputs, **GREEDY)
    assert changed(before, snapshot(model)) == []
    theirs = model(**stock_inputs(ids, inputs)).logits
    assert torch.equal(ours[valid], theirs[valid]) and torch.equal(told_by_the_prompt[valid], theirs[valid])
    stock = model.generate(**ids, pixel_values=inputs["pixel_values"], **GREEDY)
    assert torch.equal(generated.sequences, stock.sequences[:, ids["input_ids"].shape[1] :])
    assert torch.equal(torch.stack(generated.logits), torch.stack(stock.logits))


@torch.no_grad()
def test_a_video_is_written_frame_by_frame():
    """As Hugging Face's processor does: words and a run of placeholders a frame, the frames among the pixels."""
    model, ids = tiny_internvl.shared(), batch(prompt(5, 20, "1", 21, "1", 22, "1", 8))
    frames = images(1, 1, 1)["pixel_values"]
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    assert torch.equal(vlm.forward(**ids, pixel_values=frames).logits, model(**ids, pixel_values=frames).logits)
    vlm.compressor = vzip.VisionZip(BUDGET)
    together = vlm.prepare(**ids, pixel_values=frames)
    assert together.num_visual_tokens == [9, 9, 9]
    alone = [vlm.encode_images(frame)[0] for frame in frames.split(1)]
    rows = together.inputs_embeds[0][together.visual_index[0] >= 0]
    torch.testing.assert_close(rows, torch.cat(alone), rtol=0, atol=1e-5)


def recorded(model, pixel_values):
    """Queries, keys and attention maps of each layer of the tower, ``[N, H, L, ...]`` in float64, as it runs."""
    layers = []

    def recording(module, query, key, value, attention_mask, scaling, **_kwargs):
        weights = (query.double() @ key.double().transpose(-1, -2) * scaling).softmax(-1)
        layers.append((query.double(), key.double(), weights))
        return (weights @ value.double()).to(query.dtype).transpose(1, 2), None

    AttentionInterface.register("recording_internvl_for_a_test", recording)
    tower = model.model.vision_tower
    usual, tower.config._attn_implementation = tower.config._attn_implementation, "recording_internvl_for_a_test"
    try:
        return layers, tower(pixel_values).last_hidden_state.double()
    finally:
        tower.config._attn_implementation = usual


@pytest.mark.parametrize(("vision", "layer"), [({}, None), ({"use_qk_norm": True}, 2)], ids=["plain", "qk norm"])
@torch.no_grad()
def test_units_by_a_plain_loop_over_recorded_attention(vision, layer):
    model, inputs = tiny_internvl.build(**vision), images(2, 1)
    adapter = vzip.CompressedVlm(model, vzip.Identity()).adapter
    names = [*SCORES, "keys", "undivided_keys"]
    reads = frozenset(Signal(name, layer) for name in names)
    ((_, found),) = adapter.image_outputs(adapter.read_inputs(**inputs), reads)
    layers, hidden = recorded(model, inputs["pixel_values"])
    queries, keys, maps = layers[(layer or 4) - 1]
    assert (found.has_cls, found.grid, found.first_stock_row) == (False, (8, 8), 0)
    scale = 32**-0.5
    for tile in range(3):
        whole = (queries[tile].transpose(0, 1).flatten(1) @ keys[tile].transpose(0, 1).flatten(1).T * scale).softmax(-1)
        for unit in range(tile, UNITS, 7):
            line, column = divmod(unit, 8)
            patches = [1 + 16 * (2 * line + y) + 2 * column + x for y in (0, 1) for x in (0, 1)]  # row 0 is CLS
            wanted = {
                "attention": maps[tile, :, 0, patches].sum(dim=0),
                "received_attention": maps[tile][:, :, patches].mean(dim=(0, 1)),
                "undivided_attention": whole[0, patches],
                "key_norms": keys[tile][:, patches].norm(dim=-1).mean(dim=0),
                "keys": keys[tile][:, patches].mean(dim=0),
                "undivided_keys": keys[tile][:, patches].transpose(0, 1).flatten(1),
            }
            for name, of_patches in wanted.items():
                ours = found.read(Signal(name, layer))[tile, unit].double()
                torch.testing.assert_close(ours, of_patches.mean(dim=0), rtol=1e-4, atol=1e-6)
            row = torch.cat([hidden[tile, patch] for patch in patches])
            torch.testing.assert_close(found.hidden[tile, unit].double(), row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["visionzip", "divprune", "vscan", "mmtok", "resized", "merge_dropped"])
@torch.no_grad()
def test_images_of_many_tiles_equal_singles(name):
    settings = {"local_layer": 1, "window": 3} if name == "vscan" else {}
    budget = vzip.TokenBudget(12, 4) if name == "resized" else BUDGET
    vlm = vzip.CompressedVlm(
        tiny_internvl.shared(), methods.build(name, budget, **settings), methods.Words(), positions="original"
    )
    counts, inputs, asked = [5, 1, 3], images(5, 1, 3), list(methods.QUESTIONS[:2])
    rows = [[i for n, i in enumerate(row) if i != IMAGE or row[n - 1] != IMAGE] for row in ROWS]
    together = vlm.prepare(**batch(*rows), **inputs, questions=asked)
    size = 16 if name == "resized" else 9
    assert together.num_visual_tokens == [size * count for count in counts]
    assert vlm.expected_num_visual_tokens(**inputs) == together.num_visual_tokens
    of_images = inputs["pixel_values"].split(counts)
    for number, (pixels, own) in enumerate([(torch.cat(of_images[:2]), [5, 1]), (of_images[2], [3])]):
        ids = batch(rows[number])
        single = {"pixel_values": pixels, "num_patches": torch.tensor(own), "questions": asked[number : number + 1]}
        alone = vlm.prepare(**ids, **single)
        length = alone.attention_mask.shape[1]
        torch.testing.assert_close(together.inputs_embeds[number, -length:], alone.inputs_embeds[0], rtol=0, atol=1e-4)
        assert torch.equal(together.position_ids[number, -length:], alone.position_ids[0])


@torch.no_grad()
def test_resized_sees_a_smaller_image_before_the_shuffle():
    """Eight by eight patches make four by four units; the tower itself interpolates its positions."""
    model = tiny_internvl.shared()
    vlm, pixels = vzip.CompressedVlm(model, vzip.Resized(vzip.TokenBudget(12, 4))), images(1)["pixel_values"]
    small = torch.nn.functional.interpolate(pixels, (56, 56), mode="bicubic", antialias=True)
    features = model.model.get_image_features(pixel_values=small).pooler_output[0]
    torch.testing.assert_close(vlm.encode_images(pixels)[0], features, rtol=0, atol=1e-5)


def plain_tiles(image, side, processor):
    """The tiles of an image, as InternVL's scripts make them, in plain steps."""
    best, grid = 1e9, (1, 1)
    for columns, lines in sorted(((c, r) for c in range(1, 13) for r in range(1, 13) if c * r <= 12), key=np.prod):
        distance = abs(image.width / image.height - columns / lines)
        if distance < best:
            best, grid = distance, (columns, lines)
        elif distance == best and image.width * image.height > 0.5 * side * side * columns * lines:
            grid = (columns, lines)
    columns, lines = grid
    whole = image.resize((columns * side, lines * side), Image.Resampling.BICUBIC)
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(lines) for x in range(columns)]
    tiles = [whole.crop(box) for box in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((side, side), Image.Resampling.BICUBIC))
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    return torch.stack([torch.tensor((np.asarray(t) / 255 - mean) / std).permute(2, 0, 1) for t in tiles])


def test_tiles_by_plain_steps():
    config = tiny_internvl.shared().config
    processor, random = new_image_processor(config), np.random.default_rng(0)
    sizes = [(112, 112), (90, 40), (400, 400), (331, 120), (30, 500), (700, 300), (1, 1), (224, 225)]
    pictures = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    inputs = prepare_images(pictures, processor)
    wanted = [plain_tiles(image, 112, processor) for image in pictures]
    assert inputs["num_patches"].tolist() == [len(tiles) for tiles in wanted]
    assert {1, 13} & {*inputs["num_patches"].tolist()} and len({*inputs["num_patches"].tolist()}) > 4
    torch.testing.assert_close(inputs["pixel_values"].double(), torch.cat(wanted), rtol=0, atol=1e-5)
    grey = prepare_images([Image.new("L", (60, 200), 128)], processor)
    assert len(grey["pixel_values"]) == int(grey["num_patches"]) == 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With 448 pixels and 256 visual tokens a tile, as the published ones."""
    directory = tmp_path_factory.mktemp("internvl") / "model"
    make_random_model.save("internvl", directory)
    return directory


def test_prompts_are_written_as_internvl_does(checkpoint):
    vlm = vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(BUDGET))
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red?"}]}]
    text = vlm.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == ("<|im_start|>user\n<img><IMG_CONTEXT></img>\nis it red?<|im_end|>\n<|im_start|>assistant\n")
    inputs = vlm.build_inputs([text], [[Image.new("RGB", (900, 448), "red")]])
    assert inputs["num_patches"].tolist() == [3] and vlm.prepare(**inputs).num_visual_tokens == [27]
    first, second = Image.new("RGB", (448, 448), "red"), Image.new("RGB", (448, 900), "blue")
    chat = vlm.chat()
    chat.ask("is it red?", images=[first], max_new_tokens=2)
    warm = chat.ask("and now?", images=[second], max_new_tokens=3)
    assert [visual.num_visual_tokens for visual in chat.visuals] == [9, 27]
    text = vlm.processor.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, tokenize=False)
    cold = vlm.generate(**vlm.build_inputs([text], [[first, second]]), max_new_tokens=3)
    assert vlm.processor.tokenizer.decode(cold[0], skip_special_tokens=True).strip() == warm


def test_gradients_reach_the_projector_alone():
    model = tiny_internvl.build()
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    model.requires_grad_(False)
    vlm.adapter.projector.requires_grad_(True)
    ids = batch(*ROWS, side="right")
    labels = torch.where((ids["input_ids"] == IMAGE) | ~ids["attention_mask"].bool(), -100, ids["input_ids"])
    vlm.forward(**ids, **images(5, 1, 3), labels=labels).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if "multi_modal_projector" in name}
    assert all(float(p.grad.abs().sum()) > 0 for p in vlm.adapter.projector.parameters())


@torch.no_grad()
def test_a_pruner_drops_tokens_of_its_tiles():
    vlm = vzip.CompressedVlm(tiny_internvl.shared(), vzip.VisionZip(BUDGET), pruner=vzip.FastV(1, 0.5))
    vlm.generate(**batch(*ROWS), **images(5, 1, 3), max_new_tokens=2)
    assert vlm.last_num_visual_tokens == [45, 9, 27]
    assert vlm.last_pruned.visual_schedule == [[45, 22], [9, 4], [27, 14]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_patches": torch.tensor([2, 2])}, r"num_patches .*\[2, 2\]: must be integers \[images\].* 5 together"),
        ({"num_patches": torch.tensor([5.0])}, r"num_patches is torch.float32 of shape \(1,\): must be integers"),
        ({"num_patches": torch.tensor([6, -1])}, r"\[6, -1\]: must be integers"),
        ({"pixel_values": torch.zeros(1, 5, 3, 112, 112)}, r"this model takes \[tiles of all images"),
        ({"pixel_values": None, "num_patches": torch.tensor([5])}, "pixel_values is missing"),
    ],
)
def test_wrong_tensors_are_refused(wrong, message):
    vlm = vzip.CompressedVlm(tiny_internvl.shared(), vzip.VisionZip(BUDGET))
    with pytest.raises(PromptError, match=message):
        vlm.prepare(**batch(prompt(5, "5", 7)), **{**images(5), **wrong})


def test_what_cannot_be_served_is_refused_by_name():
    model = tiny_internvl.shared()
    with pytest.raises(ConfigError, match=r"FlowCut drops patches inside.*four neighbouring patches"):
        vzip.CompressedVlm(model, vzip.FlowCut(BUDGET))
    with pytest.raises(ConfigError, match=r"model\.row_newline=True: InternVL's tiles"):
        vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), row_newline=True)
    with pytest.raises(ConfigError, match=r"model\.preprocess='llava': .* must be one of hf"):
        vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), preprocess="llava")
    for name, value, message in (
        ("downsample_ratio", 0.25, "downsample_ratio=0.25"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy=full"),
        ("vision_config.use_mean_pooling", False, "use_mean_pooling=false"),
        ("vision_config.image_size", (112, 140), r"vision_config\.image_size=\(112, 140\)"),
        ("vision_config.image_size", (119, 119), "17 patches on a side must be a multiple of 2"),
    ):
        config = tiny_internvl.build().config
        owner = config.vision_config if "." in name else config
        setattr(owner, name.rpartition(".")[2], value)
        with pytest.raises(UnsupportedModelError, match=message):
            adapter_class_for_config(config)


def test_published_sizes():
    for name, millions in {"internvl3_1b": 938, "internvl3_2b": 2089, "internvl3_8b": 7944}.items():
        config = SHAPES[name]().config
        geometry = adapter_class_for_config(config).check_config(config)
        assert (geometry.image_size, geometry.shape().num_units, SHAPES[name]().num_crops) == (448, 256, 13)
        text = config.text_config
        layers = text.num_hidden_layers * (
            text.hidden_size * (2 * text.hidden_size + 3 * text.intermediate_size)
            + 2 * text.hidden_size * (text.hidden_size // text.num_attention_heads) * text.num_key_value_heads
        )
        assert (304e6 + layers + 2 * text.vocab_size * text.hidden_size) / 1e6 == pytest.approx(millions, rel=0.01)
