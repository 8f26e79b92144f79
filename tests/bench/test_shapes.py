"""Models built without downloading: sizes, buffers, dtype, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import mgm_layout, tiny, tiny_mini_gemini
from tests.bench.conftest import bench_model, build

from vzip.bench import device_memory as memory
from vzip.bench import shapes
from vzip.bench.settings import BenchSettings, tower_parameters
from vzip.bench.shapes import BenchModel
from vzip.bench.stages import METHOD_CLASSES, run_pass
from vzip.bench.visuals import visuals_of
from vzip.bench.workload import check
from vzip.config.options import config_dir, option_values
from vzip.errors import ConfigError, UnsupportedModelError
from vzip.models.families import adapter_for_model

# 24 layers with biases and norms; patch and position embeddings, CLS, the norms before and after.
TOWER = 24 * (4 * 1024**2 + 2 * 1024 * 4096 + 13 * 1024) + (588 + 577 + 1 + 4) * 1024
TOWER_224 = TOWER - (577 - 257) * 1024
PROJECTOR_7B, PROJECTOR_13B = 20_979_712, 31_467_520
# Layers; then the text embedding and head of 32064 words each and the last norm.
VICUNA_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 64129 * 4096
VICUNA_13B = 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 64129 * 5120
# torchvision's convnext_large, 197 767 336 parameters, without its head and the norm before that.
CONVNEXT_L = 197_767_336 - 1000 * 1537 - 2 * 1536
# SigLIP's 26 layers and 729 positions, without CLS and the norm before; Qwen2, whose q, k and v have biases.
SIGLIP = 26 * (4 * 1152**2 + 2 * 1152 * 4304 + 9 * 1152 + 4304) + (588 + 1 + 729 + 2) * 1152
PROJECTOR_ONEVISION = 1152 * 3584 + 3584**2 + 2 * 3584
QWEN2_7B = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944 + 3584 + 2 * 512 + 2 * 3584) + (2 * 152128 + 1) * 3584
TEMPORAL = 24 * (4 * 1025 * 1024 + 2 * 1024 + 8 * 1024)  # LanguageBind's 264 tensors
MINING = (2 * 1024 + 1025 * 1024) + 2 * (2 * 2880 + 2881 * 1024)


@pytest.mark.parametrize(
    ("name", "num_parameters", "projector"),
    [
        ("clip_l_336", TOWER, 0),
        ("llava15_7b", TOWER + PROJECTOR_7B + VICUNA_7B, PROJECTOR_7B),
        ("llava15_13b", TOWER + PROJECTOR_13B + VICUNA_13B, PROJECTOR_13B),
        ("llava_next_7b", TOWER + PROJECTOR_7B + VICUNA_7B + 4096, PROJECTOR_7B),  # the newline token
        ("video_llava_7b_hf", 2 * TOWER_224 + PROJECTOR_7B + VICUNA_7B, PROJECTOR_7B),
        ("video_llava_7b", 2 * TOWER_224 + TEMPORAL + PROJECTOR_7B + VICUNA_7B, PROJECTOR_7B),
        ("llava_onevision_7b", SIGLIP + PROJECTOR_ONEVISION + QWEN2_7B + 3584, PROJECTOR_ONEVISION),
        (
            "mini_gemini_7b",
            TOWER + CONVNEXT_L + MINING + PROJECTOR_7B + VICUNA_7B - 2 * 64 * 4096,  # Vicuna's own 32000 words
            PROJECTOR_7B,
        ),
    ],
)
def test_shapes_have_the_known_sizes(name: str, num_parameters: int, projector: int) -> None:
    built = shapes.build_meta(shapes.resolve(name), torch.bfloat16)
    assert sum(p.numel() for p in built.parameters()) == num_parameters
    assert sum(p.numel() for n, p in built.named_parameters() if "multi_modal_projector" in n) == projector


@pytest.mark.parametrize(
    ("name", "num_crops", "vanilla", "budget", "compressed"),
    [
        ("llava15_13b", 1, 576, "64tok", 64),
        ("llava_next_7b", 5, 2880 + 48, "32tok", 160),
        ("video_llava_7b", 8, 2056, "17tok", 136),
        ("llava_onevision_0_5b", 10, 729 + 81 * 82, "64tok", 640),
        ("llava_video_7b", 64, 64 * 196 + 1, "64tok", 64 * 64),
        ("mini_gemini_13b", 1, 576, "64tok", 64),
    ],
)
def test_default_prompts_are_the_papers(name: str, num_crops: int, vanilla: int, budget: str, compressed: int) -> None:
    model = shapes.resolve(name)
    assert model.num_crops == num_crops
    meta = shapes.build_meta(model, torch.bfloat16)
    assert sum(s.num_vanilla for s in visuals_of(adapter_for_model(meta), num_crops, model.medium).shapes()) == vanilla
    found, counts = BenchSettings().token_budget(model)
    assert (found, counts.num_tokens * num_crops) == (budget, compressed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_build_has_the_stock_buffers_and_finite_varied_weights(dtype: torch.dtype) -> None:
    model = bench_model()
    built = shapes.build_random(model, torch.device("cpu"), dtype)
    stock = tiny.llava()
    expected = dict(stock.named_buffers())
    found = dict(built.named_buffers())
    assert found.keys() == expected.keys() and found
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name
    for name, parameter in built.named_parameters():
        assert parameter.dtype == dtype and parameter.device.type == "cpu" and not parameter.requires_grad
        assert torch.isfinite(parameter).all(), name
        if parameter.ndim > 1:
            assert not torch.equal(parameter[0], parameter[1]), name
    inputs = {
        "pixel_values": tiny.pixels(1).to(dtype),
        "input_ids": torch.tensor([[5] + [tiny.IMAGE_TOKEN] * 64 + [6]]),
    }
    logits = built(**inputs).logits
    assert torch.isfinite(logits).all() and logits.std() > 0.1


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (
        shapes.build_random(bench_model(), torch.device("cpu"), torch.float32, seed).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_shared_weights_stay_shared() -> None:
    model = bench_model()
    model.config.tie_word_embeddings = True
    model.config.text_config.tie_word_embeddings = True
    built = shapes.build_random(model, torch.device("cpu"), torch.float32)
    assert built.get_input_embeddings().weight is built.get_output_embeddings().weight


def test_large_weights_repeat_no_row() -> None:
    """The noise is shorter than a large weight; its prime length keeps rows of a matrix apart."""
    parameter = torch.empty(3000, 1024)
    noise = torch.randn(shapes.NOISE_PERIOD)
    shapes._fill_from(parameter, noise, 5, 0.5)
    flat = parameter.view(-1)
    assert flat[0] == noise[5] * 0.5
    assert (
        flat[shapes.NOISE_PERIOD] == flat[0] and flat[-1] == noise[(5 + flat.numel() - 1) % shapes.NOISE_PERIOD] * 0.5
    )
    assert torch.unique(parameter[:, 0]).numel() > 2900


def test_local_directory_is_read(checkpoint: Path) -> None:
    model = shapes.resolve(str(checkpoint))
    assert model.default_weights == "pretrained" and not model.tower_only
    assert model.vision_config.hidden_size == 32


def test_published_models_are_those_of_the_configuration() -> None:
    for name in set(shapes.SHAPES) - {"clip_l_336"}:
        assert shapes.resolve(name).checkpoint == option_values(config_dir(), "model", name)["name_or_path"]


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llava15_7b'") as error:
        shapes.resolve("llava15_7")
    assert "clip_l_336" in str(error.value)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    for content in (json.dumps({"model_type": "bert"}), "not json", json.dumps({"model_type": "gpt9"})):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UnsupportedModelError):
            shapes.resolve(str(tmp_path))


@pytest.mark.parametrize("family", ["llava_next", "video_llava", "mini_gemini"])
def test_directories_of_every_family_are_built_from_their_own_weights(family: str, tmp_path: Path) -> None:
    small = tiny_mini_gemini.mini_gemini() if family == "mini_gemini" else getattr(tiny, family)()
    small.save_pretrained(tmp_path)
    w = build(shapes.resolve(str(tmp_path)))
    assert w.visuals.num_crops == {"llava_next": 5, "video_llava": 8, "mini_gemini": 1}[family]
    stored = small.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in w.model.state_dict().items())


def test_the_published_layout_of_mini_gemini_is_read(tmp_path: Path) -> None:
    small = tiny_mini_gemini.mini_gemini(vocab_size=mgm_layout.VOCABULARY)
    w = build(shapes.resolve(str(mgm_layout.save_all(small, tmp_path))))
    assert torch.equal(w.model.lm_head.weight, small.lm_head.weight)  # type: ignore[union-attr]  # a Linear
    assert run_pass(METHOD_CLASSES["vzip"](w)).num_visual_tokens == 16


def test_too_large_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _device: 20 * memory.GIB)
    settings = BenchSettings(model="llava15_13b", device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=r"needs about \d+\.\d GiB on cpu, but only 20\.0 GiB"):
        check(settings, shapes.resolve("llava15_13b"))
    check(BenchSettings(model="clip_l_336", device="cpu"), shapes.resolve("clip_l_336"))


def test_estimate_counts_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP-L with 5 crops keeps 24 x 5 x 16 x 577^2 float32 numbers: 2.4 GiB more than without eager_maps."""
    asked: list[int] = []
    monkeypatch.setattr("vzip.bench.workload.refuse_if_too_large", lambda needed, _device, _what: asked.append(needed))
    model = shapes.resolve("clip_l_336")
    for methods in (("vzip",), ("vzip", "eager_maps")):
        check(BenchSettings(device="cpu", dtype="float32", num_crops=5, methods=methods), model)
    maps = 24 * 5 * 16 * 577**2 * 4
    assert asked[0] > 303_000_000 * 4
    assert maps < asked[1] - asked[0] < 1.5 * maps


def test_tower_parameters_are_nearly_all() -> None:
    model = shapes.resolve("clip_l_336")
    exact = sum(p.numel() for p in shapes.build_meta(model, torch.float32).parameters())
    assert exact * 0.99 < tower_parameters(model.config) <= exact


def test_prompt_longer_than_the_positions() -> None:
    model: BenchModel = bench_model()
    positions = model.config.text_config.max_position_embeddings
    settings = BenchSettings(device="cpu", budget="12+4", num_crops=positions // 64)
    with pytest.raises(ConfigError, match=f"{positions} positions.*leave vanilla out"):
        check(settings, model)
    check(replace(settings, methods=("vzip", "eager_maps")), model)
