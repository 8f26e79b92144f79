"""LLaVA's own layout: logits of LLaVA's code, a directory written by hand, tuned, written back and read again."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from tests import tiny
from tests.llava_layout import CLIP, parts_of, save_all
from tests.mgm_layout import VOCABULARY
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

import vzip
from vzip import cli
from vzip.errors import CheckpointError, UnsupportedModelError
from vzip.models.weights.tuned import describe, save_tuned
from vzip.results.provenance import weights_sha256

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_layout_tiny"
BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
WIDTH_FIRST = [[2 * 112, 112], [112, 2 * 112], [2 * 112, 2 * 112], [3 * 112, 112], [112, 3 * 112]]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The golden checkpoints and the language model that two of them name, which has the first one's weights."""
    root = tmp_path_factory.mktemp("theirs") / "llava"
    shutil.copytree(GOLDEN, root)
    whole = load_file(root / "llava-v1.5-tiny" / "model.safetensors")
    base = {name: tensor for name, tensor in whole.items() if "mm_projector" not in name}
    torch.save(base, root / "vicuna-tiny" / "pytorch_model.bin")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(root / "llava-v1.5-tiny" / name, root / "vicuna-tiny")
    return root


@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.5-tiny-pretrain", "llava-v1.5-tiny-lora"])
@torch.no_grad()
def test_logits_are_those_of_llavas_own_code(theirs, name):
    vlm = vzip.load_vlm(theirs / name, dtype="float32")
    file = theirs / name / "expected.safetensors"
    expected = load_file(file)
    with safe_open(file, framework="pt") as opened:
        prompts = json.loads(opened.metadata()["prompts"])
    assert type(vlm.model) is LlavaForConditionalGeneration and vlm.adapter.image_token_id == 384
    for number, prompt in enumerate(prompts):
        inputs = vlm.build_inputs([prompt], [[Image.fromarray(expected[f"{number}.image"].numpy())]])
        assert torch.equal(inputs["pixel_values"], expected[f"{number}.pixel_values"])
        ids = expected[f"{number}.input_ids"].where(expected[f"{number}.input_ids"] >= 0, 384)
        own = inputs["input_ids"][0]
        repeated = (own == 384) & (own.roll(1) == 384)  # the processor writes a placeholder for each visual token
        assert torch.equal(own[~repeated], ids[0])
        if f"{number}.logits" in expected:
            logits = vlm.forward(**inputs).logits[:, -8:, :384]
            torch.testing.assert_close(logits, expected[f"{number}.logits"], rtol=0, atol=2e-5)
        if f"{number}.generated" in expected:
            new = vlm.generate(**inputs, max_new_tokens=8, do_sample=False)
            assert new.tolist() == expected[f"{number}.generated"][:, 1:].tolist()
    question = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    asked = vlm.processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert name.endswith("pretrain") or asked == prompts[0]


@pytest.fixture(scope="module")
def model():
    return tiny.llava(vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save_all(model, tmp_path_factory.mktemp("ours"))


@torch.no_grad()
def test_a_directory_written_by_hand_is_the_model_it_was_made_from(checkpoint, model):
    vlm = vzip.load_vlm(checkpoint)
    read, written = vlm.model.state_dict(), model.state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name][: len(written[name])], written[name]) for name in written)
    rows = read["lm_head.weight"][VOCABULARY:]
    assert len(rows) == 64 and torch.allclose(rows, written["lm_head.weight"].mean(0))  # of 320 + 2 words: 384
    assert weights_sha256(str(checkpoint)) is not None
    ids = torch.tensor([[5, VOCABULARY] + [6] * 3])
    stock = vlm.model(
        torch.tensor([[5, *[VOCABULARY] * 64, 6, 6, 6]]), pixel_values=tiny.llava_inputs(1)["pixel_values"]
    )
    assert torch.equal(vlm.forward(ids, **tiny.llava_inputs(1)).logits, stock.logits)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llava-v1.5-tiny", "openai/clip-tiny/pytorch_model.bin"),
        ("llava-v1.5-tiny", "llava-v1.5-tiny/model.safetensors"),
        ("llava-v1.5-tiny-pretrain", "llava-v1.5-tiny-pretrain/mm_projector.bin"),
        ("llava-v1.5-tiny-pretrain", "vicuna-tiny/pytorch_model.bin"),
        ("llava-v1.5-tiny-lora", "llava-v1.5-tiny-lora/adapter_model.bin"),
        ("llava-v1.5-tiny-lora", "llava-v1.5-tiny-lora/non_lora_trainables.bin"),
        ("llava-v1.5-tiny-lora", "llava-v1.5-tiny-lora/adapter_config.json"),
        ("llava-v1.5-tiny-lora", "vicuna-tiny/pytorch_model.bin"),
    ],
)
def test_a_records_digest_is_of_all_that_decides_the_weights(theirs, tmp_path, name, changed):
    root = tmp_path / "llava"
    shutil.copytree(theirs, root)
    before = weights_sha256(str(root / name))
    assert before == weights_sha256(str(theirs / name)) is not None
    file = root / changed
    file.write_bytes(_another(file))
    assert weights_sha256(str(root / name)) != before


def _another(file):
    """The file with another weight, or another scale of its LoRA layers."""
    if file.suffix == ".json":
        return json.dumps(json.loads(file.read_text()) | {"lora_alpha": 99}).encode()
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    state[min(state)] = state[min(state)] + 1
    if file.suffix == ".safetensors":
        return save(state)
    torch.save(state, written := io.BytesIO())
    return written.getvalue()


def test_an_unused_tower_inside_is_not_in_the_digest_and_one_that_is_trained_alone_is(model, tmp_path):
    for unfreeze in (False, True):
        directory = save_all(model, tmp_path / str(unfreeze), tower_inside=True, unfreeze_mm_vision_tower=unfreeze)
        before = weights_sha256(str(directory))
        beside = directory.parents[1] / CLIP / "pytorch_model.bin"
        beside.write_bytes(_another(beside))
        assert (weights_sha256(str(directory)) == before) is unfreeze


@torch.no_grad()
def test_images_that_llava_does_not_pad_are_cropped_as_it_crops_them(model, checkpoint, tmp_path, caplog):
    """CLIP's processor alone makes them; also of what is merged from such a checkpoint, which says so in its config."""
    square = save_all(model, tmp_path, image_aspect_ratio="square")
    image = Image.effect_noise((90, 50), 80).convert("RGB")
    clip = CLIPImageProcessor.from_pretrained(square.parents[1] / CLIP)
    vlm = vzip.load_vlm(square)
    assert vlm.preprocess == "hf" and vzip.load_vlm(checkpoint).preprocess == "llava" and not caplog.records
    expected = clip(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(vlm.preprocess_images([image])["pixel_values"], expected)
    vlm.model.save_pretrained(tmp_path / "merged")
    vlm.processor.save_pretrained(tmp_path / "merged")
    assert torch.equal(vzip.load_vlm(tmp_path / "merged").preprocess_images([image])["pixel_values"], expected)
    padded = vzip.load_vlm(square, preprocess="llava")
    assert padded.preprocess == "llava" and len(caplog.records) == 1
    assert "model.preprocess=llava pads images" in caplog.text and "image_aspect_ratio=square" in caplog.text


@pytest.mark.parametrize("unfreeze", [False, True])
def test_a_tower_inside_is_used_where_it_was_trained(model, tmp_path, unfreeze):
    directory = save_all(model, tmp_path, "safetensors", tower_inside=True, unfreeze_mm_vision_tower=unfreeze)
    name = "model.vision_tower.pre_layrnorm.weight"
    read = vzip.load_vlm(directory).model.state_dict()[name]
    assert torch.equal(read, model.state_dict()[name] + unfreeze)


@pytest.mark.parametrize("as_text", [False, True])
@torch.no_grad()
def test_tiles_are_read_height_first(as_text, tmp_path):
    """Also where LLaVA's training wrote its own option down: "[(336, 672), ...]"."""
    next_model = tiny.llava_next(vocab_size=VOCABULARY)
    tiles = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": str(list(map(tuple, WIDTH_FIRST))) if as_text else WIDTH_FIRST,
        "mm_patch_merge_type": "spatial_unpad",
    }
    vlm = vzip.load_vlm(save_all(next_model, tmp_path, **tiles))
    assert type(vlm.model) is LlavaNextForConditionalGeneration
    expected = [[height, width] for width, height in WIDTH_FIRST]
    assert vlm.model.config.image_grid_pinpoints == vlm.processor.image_processor.image_grid_pinpoints == expected
    assert torch.equal(vlm.model.model.image_newline, next_model.model.image_newline)
    inputs = vlm.build_inputs(["USER: <image>\na dog? ASSISTANT:"], [[Image.new("RGB", (100, 400), "blue")]])
    assert inputs["pixel_values"].shape[1] == 4  # three tiles below each other, and the whole


def test_a_tuned_projector_is_written_back_and_read_again(checkpoint, tmp_path):
    vlm = vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(BUDGET))
    header = describe(vlm.adapter, vlm.compressor, str(checkpoint), None, ["projector"])
    ids, inputs = torch.tensor([[5, VOCABULARY, 6, 7]]), tiny.llava_inputs(1)
    parameters = dict(vlm.adapter.projector.named_parameters())
    before = vlm.forward(ids, **inputs).logits.detach()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    vlm.forward(ids, labels=ids, **inputs).loss.backward()
    optimizer.step()
    tensors = {f"model.multi_modal_projector.{name}": value.detach() for name, value in parameters.items()}
    save_tuned(tmp_path / "final", tensors, header)
    out = tmp_path / "projector"
    assert cli.main(["merge", str(tmp_path / "final"), "--out", str(out), "--mm-projector"]) == 0
    written = torch.load(out / "mm_projector.bin", weights_only=True)
    assert sorted(written) == [f"model.mm_projector.{part}" for part in ("0.bias", "0.weight", "2.bias", "2.weight")]
    fields = json.loads((out / "config.json").read_text())
    assert fields["_name_or_path"] == str(checkpoint) and fields["mm_vision_tower"] == CLIP
    shutil.move(out, checkpoint.parent / "tuned")  # where its tower is found
    again = vzip.load_vlm(checkpoint.parent / "tuned", compressor=vzip.VisionZip(BUDGET))
    with torch.no_grad():
        logits = again.forward(ids, **inputs).logits
        assert torch.equal(logits, vlm.forward(ids, **inputs).logits) and not torch.allclose(logits, before)


def test_more_than_a_projector_is_not_written_as_one(checkpoint, tmp_path, capsys):
    vlm = vzip.load_vlm(checkpoint)
    header = describe(vlm.adapter, vlm.compressor, str(checkpoint), None, ["projector", "vision_tower"])
    save_tuned(tmp_path / "final", {"a": torch.zeros(1)}, header)
    assert cli.main(["merge", str(tmp_path / "final"), "--out", str(tmp_path / "x"), "--mm-projector"]) == 2
    assert "projector, vision_tower were tuned" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear", "mm_resampler_type": "qformer"}, "'linear'.*mm_resampler_type='qformer'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"model_type": "llava_mpt"}, "model_type='llava_mpt'.*llava_mistral"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type='flat' with image_aspect_ratio='anyres'"),
        (
            {"vocab_size": "320", "mm_vision_select_layer": [-2]},
            r"_select_layer=\[-2\] in.*vocab_size='320' in",
        ),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature='cls'"),
    ],
)
def test_a_setting_that_is_not_served_is_refused(model, tmp_path, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        vzip.load_vlm(save_all(model, tmp_path, **changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d.parents[1] / CLIP), "mm_vision_tower=openai/clip-tiny.*beside the checkpoint"),
        (lambda d: (d.parents[1] / CLIP / "pytorch_model.bin").unlink(), "clip-tiny: holds no weights"),
        (
            lambda d: (d.parents[1] / CLIP / "config.json").unlink(),
            "clip-tiny: holds no config.json, and is the vision",
        ),
        (
            lambda d: (d.parents[1] / CLIP / "preprocessor_config.json").unlink(),
            "clip-tiny: holds no preprocessor_conf",
        ),
        (
            lambda d: _halve(d.parents[1] / CLIP / "pytorch_model.bin"),
            r"clip-tiny/pytorch_model\.bin: cannot be read as",
        ),
        (lambda d: _halve(d / "pytorch_model-00001-of-00003.bin"), r"-00001-of-00003\.bin: .*It is cut short, damaged"),
        (lambda d: torch.save([1], d / "pytorch_model-00001-of-00003.bin"), "-00001-of-00003.bin: cannot be read as"),
        (
            lambda d: torch.save({"lm_head.weight": 3}, d / "pytorch_model-00002-of-00003.bin"),
            "head.weight is a int, not",
        ),
        (lambda d: (d / "tokenizer.model").write_bytes(b"x"), "cannot be loaded"),
        (lambda d: (d / "pytorch_model-00002-of-00003.bin").unlink(), "1 of 3 weight files are missing"),
        (lambda d: _change(d, hidden_size=64), "of another size"),
        (lambda d: _change(d, mm_vision_select_layer=None), "has no mm_vision_select_layer"),
        (lambda d: _change(d, vocab_size=330), "320 words.*vocab_size=330"),
        (lambda d: _projector_alone(d), "the language model nowhere/vicuna .*is in none of the folders"),
    ],
)
def test_damage_is_named(model, tmp_path, damage, message):
    directory = save_all(model, tmp_path)
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        vzip.load_vlm(directory)


def _halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _change(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _projector_alone(directory):
    for file in directory.glob("pytorch_model*"):
        file.unlink()
    torch.save({}, directory / "mm_projector.bin")
    _change(directory, _name_or_path="nowhere/vicuna")


def test_a_projector_that_is_missing_is_named(model, tmp_path):
    directory = save_all(model, tmp_path)
    own, _ = parts_of(model)
    for file in directory.glob("pytorch_model*"):
        file.unlink()
    torch.save(
        {name: value for name, value in own.items() if "mm_projector" not in name}, directory / "pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match=r"4 missing \(model\.multi_modal_projector\.linear_1\.bias"):
        vzip.load_vlm(directory)


def test_lora_layers_that_do_not_fit_are_named(theirs, tmp_path):
    root = tmp_path / "llava"
    shutil.copytree(theirs, root)
    directory = root / "llava-v1.5-tiny-lora"
    layers = torch.load(directory / "adapter_model.bin", weights_only=True)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    torch.save(layers | {name: torch.zeros(4, 31)}, directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"up_proj is \(48, 4\) x \(4, 31\) for a weight of \(48, 32\)"):
        vzip.load_vlm(directory)
    del layers[name]
    torch.save(layers, directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="up_proj is not whole"):
        vzip.load_vlm(directory)
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(settings | {"r": 0}))
    with pytest.raises(CheckpointError, match=r"r=0, lora_alpha=.*numbers above 0"):
        vzip.load_vlm(directory)
    (directory / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    with pytest.raises(UnsupportedModelError, match="use_rslora=True"):
        vzip.load_vlm(directory)
