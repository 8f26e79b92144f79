"""Loading: a directory comes back as it was saved, and every way it can fail says what to do."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tiny import IMAGE_TOKEN
from transformers import LlavaForConditionalGeneration, LlavaNextVideoConfig

import vzip
from vzip.errors import CheckpointError, ConfigError, MissingPackageError, UnsupportedModelError, VzipError
from vzip.models import load
from vzip.models.environment import refuse_broken_packages
from vzip.models.families.original.tensors import CHECKPOINT_FILES, weight_files

SRC = Path(__file__).resolve().parents[2] / "src"
BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny.llava(vocab_size=320).save_pretrained(directory)
    tiny.processor().save_pretrained(directory)
    return directory


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint to damage, and a way to edit its config.json."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def edit(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return tmp_path, edit


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are read: the refusal must come before."""

    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", read)


@torch.no_grad()
def test_a_saved_model_comes_back(checkpoint):
    vlm = vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(BUDGET))
    assert not vlm.model.training and not vlm.training
    original = vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.VisionZip(BUDGET))
    ids = torch.tensor([[5, IMAGE_TOKEN, 6]])
    ours = vlm.forward(ids, pixel_values=tiny.pixels(1)).logits
    assert torch.equal(ours, original.forward(ids, pixel_values=tiny.pixels(1)).logits)
    inputs = vlm.build_inputs(["<image> hm?"], [[Image.new("RGB", (50, 30))]])
    assert vlm.generate(**inputs, max_new_tokens=2).shape == (1, 2)
    assert vlm.processor.chat_template == tiny.CHAT_TEMPLATE
    assert vlm.model.model.vision_tower.config._attn_implementation == "sdpa"


def test_defaults_and_types(checkpoint):
    assert isinstance(vzip.load_vlm(str(checkpoint)).compressor, vzip.Identity)
    for name in ("bfloat16", "float16", "float32"):
        assert vzip.load_vlm(checkpoint, dtype=name).model.dtype == getattr(torch, name)


def test_a_directory_without_processor_takes_tensors(copy, caplog):
    directory, _ = copy
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink()
    with caplog.at_level(logging.WARNING):
        vlm = vzip.load_vlm(directory)
    assert vlm.processor is None and "no processor" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bf16"}, r"model\.dtype=bf16.*bfloat16"),
        ({"dtype": "float23"}, r"did you mean 'float32'"),
        ({"preprocess": "pad"}, r"model\.preprocess=pad"),
        ({"quantization": "8"}, r"model\.quantization=8.*8bit, 4bit, null"),
        ({"compressor": vzip.VisionZip(vzip.TokenBudget(500, 76))}, "65 to choose from"),
    ],
)
def test_settings_are_refused_before_weights(checkpoint, no_weights, settings, message):
    with pytest.raises(ConfigError, match=message):
        vzip.load_vlm(checkpoint, **settings)


def test_missing_places_are_named(tmp_path, no_weights):
    for name in (str(tmp_path / "absent"), "./absent/deeper/still", "just-a-word", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no such directory"):
            vzip.load_vlm(name)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        vzip.load_vlm(tmp_path)
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        vzip.load_vlm(tmp_path / "file.bin")


def test_a_hub_id_without_network_says_how_to_use_a_copy(tmp_path):
    code = "import vzip; vzip.load_vlm('llava-hf/llava-1.5-7b-hf')"
    environment = {"PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vzip.errors.CheckpointError: model.name_or_path=llava-hf/llava-1.5-7b-hf")
    assert "network" in last and "HF_HUB_OFFLINE=1" in last and "model.name_or_path=DIR" in last


def test_missing_and_damaged_weights_are_named(copy):
    directory, _ = copy
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        vzip.load_vlm(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        vzip.load_vlm(directory)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"1 of 2 weight files are missing \(model-00002"):
        vzip.load_vlm(directory)
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a readable weight index"):
        vzip.load_vlm(directory)


def test_incomplete_weights_are_refused(copy):
    from safetensors.torch import load_file, save_file

    directory, _ = copy
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if "multi_modal_projector" in name)
    kept = weights.pop(name)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 parameters are not in the checkpoint and 0 .*multi_modal_projector"):
        vzip.load_vlm(directory)
    weights[name] = kept[:-1].contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"0 parameters .* and 1 have another size.*multi_modal_projector"):
        vzip.load_vlm(directory)


def test_other_models_are_refused_before_weights(copy, no_weights):
    directory, edit = copy
    edit(architectures=["LlavaLlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"LlavaLlamaForCausalLM.*-hf"):
        vzip.load_vlm(directory)
    edit(architectures=["LlavaForConditionalGeneration"], vision_feature_layer=[-2, -3])
    with pytest.raises(UnsupportedModelError, match=r"\[-2, -3\]"):
        vzip.load_vlm(directory)
    edit(vision_feature_layer=-9)
    with pytest.raises(UnsupportedModelError, match="vision_feature_layer=-9"):
        vzip.load_vlm(directory)
    LlavaNextVideoConfig(architectures=["LlavaNextVideoForConditionalGeneration"]).save_pretrained(directory)
    with pytest.raises(UnsupportedModelError, match=r"LlavaNextVideoForConditionalGeneration has no adapter"):
        vzip.load_vlm(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        vzip.load_vlm(directory)


def test_the_built_in_model_is_found_or_its_making_named():
    try:
        directory = load.resolve_checkpoint("vzip/tiny")
    except CheckpointError as error:
        assert "make tiny" in str(error)
    else:
        assert directory == SRC / "vzip" / "demo" / "tiny"


def test_a_broken_torchvision_is_named_when_models_are_first_used(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = "import vzip; vzip.TokenBudget(1, 1); vzip.load_vlm('x')"
    environment = {"PYTHONPATH": f"{tmp_path}:{SRC}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vzip.errors.MissingPackageError") and "pip uninstall torchvision" in last
    assert "operator torchvision::nms does not exist" in last


def test_a_broken_timm_is_named_and_absent_packages_are_fine(tmp_path, monkeypatch, checkpoint):
    (tmp_path / "timm.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match="pip uninstall timm"):
        vzip.load_vlm(checkpoint)
    refuse_broken_packages(["certainly_not_installed_anywhere"])


def add_weights(directory, **shapes):
    """Puts weights of ones into a checkpoint, under names with ``__`` for a dot."""
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("language_model__model__layers__0__self_attn__q_proj__bias", [32]),  # attention_bias is false
        ("language_model__model__layers__7__mlp__up_proj__weight", [64, 32]),
        ("vision_tower__encoder__layers__9__mlp__fc1__weight", [80, 32]),
        ("multi_modal_projector__linear_3__weight", [32, 32]),
        ("something__else", [1]),
    ],
)
def test_weights_without_a_place_are_refused(copy, name, shape):
    add_weights(copy[0], **{name: shape})
    part = name.replace("__", ".").removeprefix("language_model.model.")
    with pytest.raises(CheckpointError, match=rf"1 weights have no place.*{part}"):
        vzip.load_vlm(copy[0])


def test_a_tower_cut_short_by_its_config_is_refused(copy):
    directory, edit = copy
    config = json.loads((directory / "config.json").read_text())
    edit(vision_config=config["vision_config"] | {"num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"16 weights have no place .*encoder\.layers\.3\."):
        vzip.load_vlm(directory)


@torch.no_grad()
def test_buffers_of_older_checkpoints_are_no_weights(copy, checkpoint):
    add_weights(
        copy[0],
        language_model__model__layers__0__self_attn__rotary_emb__inv_freq=[4],
        vision_tower__embeddings__position_ids=[1, 65],
        vision_tower__vision_model__embeddings__position_ids=[1, 65],
    )
    ids, pixels = torch.tensor([[5, IMAGE_TOKEN, 6]]), tiny.pixels(1)
    older, newer = (vzip.load_vlm(path).forward(ids, pixel_values=pixels).logits for path in (copy[0], checkpoint))
    assert torch.equal(older, newer)


OWN_CODE = """
from transformers import LlavaConfig
open({mark!r}, "w").write("run")
class Own(LlavaConfig):
    model_type = "own"
"""


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}),
        ("processor_config.json", {"AutoProcessor": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"], "AutoProcessor": "own.Own"}),
    ],
)
def test_code_that_a_checkpoint_brings_is_never_run_nor_asked_about(
    copy, monkeypatch, tmp_path_factory, file, auto_map
):
    directory, _ = copy
    mark = tmp_path_factory.mktemp("mark") / "mark"
    (directory / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    path = directory / file
    content = json.loads(path.read_text()) | {"auto_map": auto_map}
    path.write_text(json.dumps(content | ({"model_type": "own"} if file == "config.json" else {})))

    def asked(*_):
        raise AssertionError("asked on the standard input")

    monkeypatch.setattr("builtins.input", asked)
    if file == "config.json":
        with pytest.raises(CheckpointError, match="code of its own, which vzip never runs"):
            load.load_vlm(directory)
    else:
        with contextlib.suppress(CheckpointError):
            load.load_vlm(directory)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"llava"',
        "{}",
        "[" * 100_000,
        b"\xff\xfe",
        '{"model_type": "llava", "text_config": 3, "vision_config": {"model_type": "clip_vision_model"}}',
        '{"model_type": "llava", "vision_config": []}',
        '{"model_type": ["llava"]}',
        '{"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": "wide"}}',
        '{"model_type": "llava", "text_config": {"model_type": "llama", "num_attention_heads": 0}}',
        '{"model_type": "llava", "vision_config": {"model_type": "clip_vision_model", "patch_size": 0}}',
        '{"model_type": "llava", "vision_config": {"model_type": "clip_vision_model", "image_size": null}}',
    ],
)
def test_a_broken_configuration_is_named(copy, no_weights, content):
    directory, _ = copy
    (directory / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(VzipError) as raised:
        load.load_vlm(directory)
    assert isinstance(raised.value, CheckpointError | UnsupportedModelError)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
        b"\xff",
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_broken_weight_index_is_named(copy, no_weights, content, name):
    directory, _ = copy
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=f"{name}: not a readable weight index"):
        load.load_vlm(directory)
    with pytest.raises(CheckpointError, match=f"{name}: not a readable weight index"):
        weight_files(directory, CHECKPOINT_FILES)


@pytest.mark.parametrize("name", ["x" * 5000, "x/" + "y" * 300, "a\0b", "~nobody-of-this-name", "a/../b", "a/b--c"])
def test_a_name_that_cannot_be(name):
    with pytest.raises(CheckpointError, match="no such directory") as raised:
        load.load_vlm(name)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(copy, value):
    directory, _ = copy
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "multi_modal_projector" in name or "projector" in name)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN or infinity \(.*projector"):
        load.load_vlm(directory)
