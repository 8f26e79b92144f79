"""Mini-Gemini's published layout, written out in small by hand: what is read back is the model it was made from."""

from __future__ import annotations

import json
import re

import huggingface_hub
import pytest
import sentencepiece
import torch
from PIL import Image
from tests import tiny_mini_gemini
from tests.mgm_layout import (
    CLIP,
    CONVNEXT,
    VOCABULARY,
    parts_of,
    published_config,
    save_all,
    save_shards,
    save_tokenizer,
    save_towers,
    timm_name,
)
from torch.nn import functional

import vzip
from vzip.errors import CheckpointError, ConfigError, UnsupportedModelError
from vzip.models import hub
from vzip.models.families.mini_gemini import MiniGeminiForConditionalGeneration
from vzip.models.families.mini_gemini.names import rename_checkpoint, rename_openclip
from vzip.models.families.mini_gemini.published import find_published
from vzip.models.families.original.checkpoint import HUB_IDS, HUB_REVISIONS
from vzip.models.families.original.names import UnexpectedName, rename_clip

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


@pytest.fixture(scope="module")
def model():
    return tiny_mini_gemini.mini_gemini(vocab_size=VOCABULARY)


@pytest.fixture(scope="module", params=["safetensors", "bin", "towers_inside"])
def checkpoint(request, model, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    directory = save_all(model, root, "bin" if request.param == "bin" else "safetensors")
    if request.param == "towers_inside":  # DeepSpeed saves the frozen towers too; those in the zoo must not be read
        own, clip, convnext = parts_of(model)
        own |= {f"model.vision_tower.vision_tower.vision_model.{name}": value for name, value in clip.items()}
        own |= {f"model.vision_tower_aux.vision_{name}": value for name, value in convnext.items()}
        own["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        save_shards(own, directory, "safetensors")
        for file in (root / CLIP / "pytorch_model.bin", root / CONVNEXT / "open_clip_pytorch_model.bin"):
            file.write_bytes(b"not read")
    return directory


@torch.no_grad()
def test_the_published_layout_is_the_model_it_was_made_from(checkpoint, model):
    vlm = vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(BUDGET))
    assert type(vlm.model) is MiniGeminiForConditionalGeneration and not vlm.model.training
    read, written = vlm.model.state_dict(), model.state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in written)
    assert vlm.model.name_or_path == str(checkpoint)
    assert vlm.adapter.image_token_id == VOCABULARY and vlm.model.generation_config.eos_token_id == 2
    ids, inputs = torch.tensor([[5, VOCABULARY, 6]]), tiny_mini_gemini.inputs(2)
    original = vzip.CompressedVlm(model, vlm.compressor).forward(
        torch.tensor([[5, 4, 6]]), pixel_values=inputs["pixel_values"][:1]
    )
    ours = vlm.forward(ids, pixel_values=inputs["pixel_values"][:1])
    assert torch.equal(ours.logits, original.logits)


@torch.no_grad()
def test_a_published_model_saved_anew_comes_back(checkpoint, tmp_path):
    vlm = vzip.load_vlm(checkpoint, dtype="bfloat16")
    assert vlm.model.dtype == torch.bfloat16
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    again = vzip.load_vlm(tmp_path)
    prompt, picture = "USER: <image>\nis there a cat? ASSISTANT:", Image.new("RGB", (40, 30), "red")
    first, second = (one.build_inputs([prompt], [[picture]]) for one in (vlm, again))
    assert all(torch.equal(first[key], second[key]) for key in ("input_ids", "attention_mask", "pixel_values"))
    assert torch.equal(vlm.forward(**first).logits, again.forward(**second).logits)


@torch.no_grad()
def test_the_renamed_tower_computes_what_timm_defines(model):
    """ConvNeXt written out over timm's names, in float64."""
    tower = tiny_mini_gemini.mini_gemini(vocab_size=VOCABULARY).model.high_res_tower.double()
    weights = {timm_name(name): value for name, value in tower.state_dict().items()}
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def norm(x, name):
        x = x.permute(0, 2, 3, 1)
        x = functional.layer_norm(x, x.shape[3:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)
        return x.permute(0, 3, 1, 2)

    def conv(x, name, **settings):
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **settings)

    def pointwise(x, name):
        x = torch.einsum("bchw,dc->bdhw", x, weights[f"{name}.weight"])
        return x + weights[f"{name}.bias"][:, None, None]

    x = norm(conv(pixels, "stem.0", stride=4), "stem.1")
    for stage, depth in enumerate([1, 1, 2, 1]):
        if stage:
            x = conv(norm(x, f"stages.{stage}.downsample.0"), f"stages.{stage}.downsample.1", stride=2)
        for block in range(depth):
            name = f"stages.{stage}.blocks.{block}"
            inner = norm(conv(x, f"{name}.conv_dw", padding=3, groups=x.shape[1]), f"{name}.norm")
            inner = pointwise(functional.gelu(pointwise(inner, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
            x = x + inner * weights[f"{name}.gamma"][:, None, None]
    last = tower(pixels)[:, 28:]
    torch.testing.assert_close(last, functional.interpolate(x, size=(16, 16), mode="bilinear"), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("rename", "name", "renamed"),  # the first three names are from JIA-Lab-research/MGM issue 103
    [
        (
            rename_checkpoint,
            "model.vision_tower_aux.vision_stages.1.blocks.1.norm.weight",
            "high_res_tower.stages.1.layers.1.layernorm.weight",
        ),
        (
            rename_checkpoint,
            "model.vision_tower_aux.vision_stages.2.blocks.4.mlp.fc1.weight",
            "high_res_tower.stages.2.layers.4.pwconv1.weight",
        ),
        (
            rename_checkpoint,
            "model.vision_tower.vision_tower.vision_model.encoder.layers.9.mlp.fc2.bias",
            "vision_tower.encoder.layers.9.mlp.fc2.bias",
        ),
        (
            rename_checkpoint,
            "model.vision_tower_aux.vision_stem.0.weight",
            "high_res_tower.embeddings.patch_embeddings.weight",
        ),
        (rename_checkpoint, "model.vlm_uni_val_projector.1.bias", "patch_info_mining.vlm_uni_val_projector.1.bias"),
        (rename_checkpoint, "model.mm_projector.2.weight", "multi_modal_projector.linear_2.weight"),
        (rename_checkpoint, "model.norm.weight", "language_model.norm.weight"),
        (rename_checkpoint, "model.layers.31.self_attn.rotary_emb.inv_freq", None),
        (rename_clip, "vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        (rename_clip, "text_model.embeddings.position_ids", None),
        (
            rename_openclip,
            "visual.trunk.stages.3.downsample.1.bias",
            "high_res_tower.stages.3.downsampling_layer.1.bias",
        ),
        (
            rename_openclip,
            "visual.trunk.stages.0.blocks.2.gamma",
            "high_res_tower.stages.0.layers.2.layer_scale_parameter",
        ),
        (rename_openclip, "transformer.resblocks.3.attn.in_proj_weight", None),
    ],
)
def test_names(rename, name, renamed):
    assert rename(name) == (None if renamed is None else f"model.{renamed}")


@pytest.mark.parametrize(
    ("rename", "name"),
    [
        (rename_checkpoint, "model.vlm_uni_gate_projector.0.weight"),
        (rename_checkpoint, "model.mm_projector.4.weight"),
        (rename_clip, "qformer.layer.0.weight"),
        (rename_openclip, "visual.trunk.blocks.0.attn.qkv.weight"),
    ],
)
def test_names_of_other_models_are_refused(rename, name):
    with pytest.raises(UnexpectedName, match=re.escape(name)):
        rename(name)


def test_prompts_are_tokenized_as_the_published_code_does(checkpoint):
    """MGM tokenizes the texts between placeholders one by one, with SentencePiece itself."""
    processor = find_published(checkpoint).processor()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    content = [{"type": "text", "text": "what is on the left?"}, {"type": "image"}]
    system = {"role": "system", "content": [{"type": "text", "text": "A chat."}]}
    prompt = processor.apply_chat_template([system, {"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == "A chat. USER: <image>\nwhat is on the left? ASSISTANT:"
    for text in (prompt, "USER: <image>\n<image>\nhm? ASSISTANT:", "USER: is it? ASSISTANT:"):
        wanted = [1]
        for number, chunk in enumerate(text.split("<image>")):
            wanted += [processor.tokenizer.convert_tokens_to_ids("<image>")] * bool(number) + pieces.encode(chunk)
        assert processor.tokenizer(text)["input_ids"] == wanted
    answered = [{"role": "user", "content": content}, {"role": "assistant", "content": content[:1]}]
    assert processor.apply_chat_template(answered).endswith("ASSISTANT: what is on the left?</s>")


@torch.no_grad()
def test_an_image_to_an_answer(checkpoint):
    vlm = vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(BUDGET))
    inputs = vlm.build_inputs(["USER: <image>\na dog? ASSISTANT:"] * 2, [[Image.new("RGB", (64, 20), "blue")]] * 2)
    assert inputs["pixel_values"].shape == (2, 3, tiny_mini_gemini.SIDE, tiny_mini_gemini.SIDE)
    assert vlm.generate(**inputs, max_new_tokens=3).shape == (2, 3)
    assert vlm.last_num_visual_tokens == [9, 9]
    expanded = vlm.processor(images=Image.new("RGB", (64, 20)), text="<image>", return_tensors="pt")["input_ids"]
    assert (expanded == vlm.adapter.image_token_id).sum() == 64


@pytest.fixture
def damaged(model, tmp_path):
    """A checkpoint without towers, and ways to write it with changes."""

    def write(remove=(), add=None, towers=True, **changes):
        directory = tmp_path / "MGM-tiny"
        directory.mkdir()
        own, of_clip, convnext = parts_of(model)
        tensors = {name: value for name, value in own.items() if name not in remove}
        tensors |= {name: torch.zeros(shape) for name, shape in (add or {}).items()}
        save_shards(tensors, directory, "safetensors")
        (directory / "config.json").write_text(json.dumps(published_config(model, **changes)))
        if towers:
            save_towers(tmp_path, of_clip, convnext, model.config)
        return directory

    return write


QUERY = "vlm_uni_query_projector.1.bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": [f"model.{QUERY}"]}, rf"1 missing \(model\.patch_info_mining\.{QUERY}\)"),
        ({"add": {"model.gate.weight": (2,)}}, r"1 tensors belong to no part.*model\.gate\.weight"),
        ({"add": {"model.layers.2.mlp.up_proj.weight": (2,)}}, r"1 unexpected \(model\.language_model\.layers\.2"),
        ({"add": {"model.mm_projector.0.bias": (31,)}}, r"of another size.*linear_1\.bias \(31,\) for \(32,\)"),
        ({"towers": False}, r"mm_vision_tower=model_zoo/OpenAI/clip.*and openai/clip.*beside the checkpoint"),
        ({"towers": False, "mm_vision_tower": "my/tower"}, r"mm_vision_tower=my/tower.*a folder called tower"),
        ({"mm_vision_tower_aux": None, "image_size_aux": None}, "has no mm_vision_tower_aux, image_size_aux"),
        ({"model_type": "mgm_gemma"}, "mgm_gemma"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named(damaged, monkeypatch, changes, message):
    def unreachable(hub_id, **_):
        assert hub_id == HUB_IDS[CLIP.rpartition("/")[2]]
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=message):
        vzip.load_vlm(damaged(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid": 2, "image_global": True}, r"image_grid=2.*not the HD models"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'"),
        ({"mm_hidden_size_aux": 61}, "mm_hidden_size_aux=61"),
        ({"image_size_aux": 100}, "multiple of 32"),
    ],
)
def test_a_setting_that_is_not_served_is_refused(damaged, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        vzip.load_vlm(damaged(**changes))


def test_a_tokenizer_of_another_size_than_the_vocabulary_is_refused(damaged):
    directory = damaged(vocab_size=330)
    save_tokenizer(directory)
    with pytest.raises(CheckpointError, match=r"320 words.*vocab_size=330"):
        vzip.load_vlm(directory)


def test_a_shard_that_is_missing_is_named(damaged):
    directory = damaged()
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 weight files are missing \(model-00002-of-00003\.safetensors\)"):
        vzip.load_vlm(directory)


def test_a_budget_that_does_not_fit_is_refused_before_weights_are_read(damaged):
    directory = damaged()
    for file in directory.glob("*.safetensors"):
        file.write_bytes(b"not read")
    with pytest.raises(ConfigError, match="65 to choose from"):
        vzip.load_vlm(directory, compressor=vzip.VisionZip(vzip.TokenBudget(60, 6)))
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        vzip.load_vlm(directory)


def test_a_tower_may_lie_next_to_the_checkpoint_under_its_name_on_the_hub(damaged, tmp_path, model):
    directory = damaged()
    (tmp_path / CONVNEXT).rename(tmp_path / HUB_IDS[CONVNEXT.rpartition("/")[2]].rpartition("/")[2])
    (tmp_path / CLIP).rename(tmp_path / CLIP.rpartition("/")[2])
    vlm = vzip.load_vlm(directory)
    assert vlm.processor is None  # no tokenizer's files in the directory: it takes tensors only
    assert torch.equal(
        vlm.model.model.high_res_tower.stages[2].layers[1].pwconv1.bias,
        model.model.high_res_tower.stages[2].layers[1].pwconv1.bias,
    )


def test_a_hub_id_is_read_from_one_commit_which_is_named(model, tmp_path, monkeypatch):
    """From a cache as the hub's client leaves it: the checkpoint at its branch, the towers at their pinned commits."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    directory = save_all(model, tmp_path)
    for hub_id, revision, source in [
        ("YanweiLi/MGM-tiny", commit, directory),
        *(
            (hub_id, HUB_REVISIONS[hub_id], tmp_path / "model_zoo" / "OpenAI" / name)
            for name, hub_id in HUB_IDS.items()
        ),
    ]:
        repository = tmp_path / "cache" / f"models--{hub_id.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        source.rename(repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else every file waits for the network
    vlm = vzip.load_vlm("YanweiLi/MGM-tiny", revision="main")
    assert vlm.revision == commit and vlm.processor is not None
    assert torch.equal(vlm.model.lm_head.weight, model.lm_head.weight)
    with pytest.raises(CheckpointError, match="neither in the local cache"):
        vzip.load_vlm("YanweiLi/MGM-tiny", revision="another")
