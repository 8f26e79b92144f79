"""Options that only some model families have: wired through, and refused elsewhere before anything is loaded."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from peft import LoraConfig, get_peft_model
from tests import tiny, tiny_mini_gemini

import vzip
from vzip.config.build import evaluation_plan, model_plan
from vzip.config.model_args import load_from_arg_string
from vzip.config.options import config_dir
from vzip.errors import CheckpointError, ConfigError


def save(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints of every family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llava": save(tiny.llava(vocab_size=320), tiny.processor(), root / "llava"),
        "next": save(tiny.llava_next(vocab_size=320), tiny.next_processor(), root / "next"),
        "video": save(tiny.video_llava(vocab_size=320, video_token=5), tiny.video_processor(), root / "video"),
        "mini": save(tiny_mini_gemini.mini_gemini(vocab_size=320), tiny_mini_gemini.processor(), root / "mini"),
    }


def words(folder: Path, *more: str) -> list[str]:
    return ["model=llava_local", f"model.name_or_path={folder}", "model.device_map=null", "budget=17tok", *more]


def test_they_reach_the_wrapper(folders: dict[str, Path]) -> None:
    model, compressor = model_plan(words(folders["next"], "model.drop_padding=true", "model.row_newline=true"))
    options = vzip.load_vlm(**model, compressor=compressor).adapter.options
    assert (options.drop_padding, options.row_newline) == (True, True)
    model, compressor = model_plan(words(folders["video"], "model.num_frames=80"))
    assert vzip.load_vlm(**model, compressor=compressor).num_frames == 80
    model, compressor = model_plan(words(folders["video"]))
    assert vzip.load_vlm(**model, compressor=compressor).num_frames == 8
    model, compressor = model_plan(words(folders["mini"], "model.drop_cls=true"))
    assert vzip.load_vlm(**model, compressor=compressor).adapter.options.drop_cls
    model, _ = model_plan(["model=video_llava_7b", "budget=17tok"])
    assert model["num_frames"] == 8 and not model["drop_padding"] and not model["row_newline"]


def test_they_are_settings_of_model_args_too(folders: dict[str, Path]) -> None:
    pytest.importorskip("lmms_eval")
    budget = "compressor=visionzip,num_dominant=14,num_contextual=3"
    text = f"pretrained={folders['next']},{budget},drop_padding=true,row_newline=true"
    options = load_from_arg_string(text, {})["vlm"].adapter.options
    assert (options.drop_padding, options.row_newline) == (True, True)
    text = f"pretrained={folders['video']},{budget},num_frames=16"
    assert load_from_arg_string(text, {})["vlm"].num_frames == 16
    text = f"pretrained={folders['mini']},{budget},drop_cls=true"
    assert load_from_arg_string(text, {})["vlm"].adapter.options.drop_cls
    for wrong, message in [
        ("num_frames=0", "num_frames=0: must be a whole"),
        ("drop_padding=1", "must be true or false"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_from_arg_string(f"pretrained={folders['video']},{budget},{wrong}", {})


@pytest.mark.parametrize(
    ("family", "more", "messages"),
    [
        ("llava", ["model.drop_padding=true"], ["model.drop_padding=True", "has no tiles"]),
        (
            "video",
            ["model.row_newline=true"],
            ["model.row_newline=True", "VideoLlavaForConditionalGeneration has no tiles"],
        ),
        ("llava", ["model.drop_cls=true"], ["model.drop_cls=True: LlavaForConditionalGeneration does not mine"]),
        ("next", ["model.drop_cls=1"], ["model.drop_cls=1: must be true or false"]),
        ("mini", ["model.drop_padding=true"], ["MiniGeminiForConditionalGeneration has no tiles"]),
        ("llava", ["model.num_frames=8"], ["model.num_frames=8: LlavaForConditionalGeneration has no video tower"]),
        ("next", ["model.num_frames=8"], ["LlavaNextForConditionalGeneration has no video tower", "must be null"]),
        ("video", ["model.num_frames=0"], ["model.num_frames=0: must be a whole number, 1 or more, or null"]),
        ("video", ["model.num_frames=2.5"], ["model.num_frames=2.5: must be"]),
        ("next", ["model.drop_padding=maybe"], ["model.drop_padding=maybe: must be true or false"]),
        ("next", ["model.drop_padding=true", "compressor=random"], ["RandomTokens does not select by attention"]),
        ("video", ["budget.num_dominant=63"], ["66 visual tokens", "65 to choose from"]),
    ],
)
def test_what_a_family_lacks_is_refused_before_loading(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, more: list[str], messages: list[str]
) -> None:
    monkeypatch.setattr(vzip, "load_vlm", lambda **_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError) as raised:
        model_plan(words(folders[family], *more))
    for message in messages:
        assert message in str(raised.value)


def test_load_vlm_refuses_them_before_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """A hub id passes the configuration; here the weights are absent, and the option is what is complained of."""
    (tmp_path / "config.json").write_text((folders["llava"] / "config.json").read_text())
    for option, message in [
        ({"num_frames": 8}, "no video tower"),
        ({"drop_padding": True}, "has no tiles"),
        ({"drop_cls": True}, "mine"),
    ]:
        with pytest.raises(ConfigError, match=message):
            vzip.load_vlm(tmp_path, **option)  # type: ignore[arg-type]


def test_a_peft_checkpoint_is_put_on_top(folders: dict[str, Path], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers 5.23 renames
        tuned = get_peft_model(tiny.llava(vocab_size=320), LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    tuned.save_pretrained(tmp_path / "lora")
    model, compressor = model_plan(words(folders["llava"], f"model.adapter_path={tmp_path / 'lora'}"))
    vlm = vzip.load_vlm(**model, compressor=compressor)
    assert sum("lora_A" in name for name, _ in vlm.model.named_parameters()) == 2  # one a layer
    # A record tells two PEFT checkpoints of one name apart.
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("eval", words(folders["llava"], f"model.adapter_path={tmp_path / 'lora'}"))
        assert evaluation_plan(cfg).evaluation["resolved_config"]["model"]["adapter_sha256"] == digest
        weights.unlink()
        with pytest.raises(CheckpointError, match=r"lora: holds no weights \(adapter_model"):
            evaluation_plan(cfg)


@pytest.mark.parametrize("name", ["lora", "runs/lora/last", "/no/lora"])
def test_a_missing_peft_checkpoint_is_refused_before_loading(folders: dict[str, Path], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.adapter_path={name}: no such directory"):
        model_plan(words(folders["llava"], f"model.adapter_path={name}"))
    model, _ = model_plan(words(folders["llava"], "model.adapter_path=org/lora"))
    assert model["adapter_path"] == "org/lora"  # load_vlm looks on the hub, before it reads the model's weights
