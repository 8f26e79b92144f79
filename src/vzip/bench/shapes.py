"""The models a measurement can be made on, and how to build them without downloading anything.

Time and memory depend on shapes and not on what the weights say, so the true 7B and 13B shapes can be measured with
random weights. They are built on the target device in the target dtype, with no float32 copy on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
)

from vzip.errors import CheckpointError, ConfigError, UnsupportedModelError, nearest
from vzip.installed import checkout
from vzip.media.video import DEFAULT_NUM_FRAMES
from vzip.models.families import adapter_class_for_config
from vzip.models.families.internvl.processing import MAX_TILES
from vzip.models.load import read_config
from vzip.models.towers.structure import geometry_from_config
from vzip.models.weights.from_config import (
    QWEN_CONFIGS,
    family_config,
    internvl_config,
    pinpoints,
    qwen2_5_vl_config,
    qwen3_vl_config,
)
from vzip.option_files import option_values

QWEN_IDS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
LLAVA_VIDEO_FRAMES = 64  # as its published rows (report/tables/protocols)
NOISE_PERIOD = 1_048_573  # a prime just under 2**20: rows of a matrix, whose lengths are composite, then all differ


@dataclass(frozen=True)
class BenchModel:
    """What to measure.

    Attributes:
        name: as the user wrote it.
        config: a family's configuration, or a vision tower's where that is measured alone.
        checkpoint: directory or hub id that ``weights=pretrained`` loads.
        default_weights: ``random`` for bare shapes, ``pretrained`` for directories and the shipped model.
        notes: what a reader of its numbers must know, one sentence each.
        medium: what a prompt shows, of a family that takes either.
    """

    name: str
    config: PretrainedConfig
    checkpoint: str
    default_weights: str = "random"
    notes: tuple[str, ...] = ()
    medium: Literal["image", "video"] = "image"

    @property
    def tower_only(self) -> bool:
        """Whether there is no language model to measure."""
        return self.config.model_type in TOWER_TYPES

    @property
    def vision_config(self) -> PretrainedConfig:
        """The vision tower's configuration."""
        return self.config if self.tower_only else self.config.vision_config

    @property
    def has_fixed_crops(self) -> bool:
        """Whether all inputs of the vision tower have one size; otherwise there is no published way to compare with."""
        return not isinstance(self.config, QWEN_CONFIGS)

    @property
    def rows_per_crop(self) -> int:
        """Rows of an input of the vision tower: patches and CLS, or the patches of an image of 1024 visual tokens."""
        vision = self.vision_config
        if not self.has_fixed_crops:
            return 1024 * vision.spatial_merge_size**2
        return geometry_from_config(vision).num_patches + 1

    @property
    def num_crops(self) -> int:
        """Default number of tower inputs in a prompt."""
        if isinstance(self.config, LlavaOnevisionConfig):
            return LLAVA_VIDEO_FRAMES if self.medium == "video" else 10  # all tiles that enter as they are
        if isinstance(self.config, LlavaNextConfig):
            side = self.vision_config.image_size
            return 1 + max(height // side * (width // side) for height, width in self.config.image_grid_pinpoints)
        if isinstance(self.config, InternVLConfig):
            return MAX_TILES + 1
        return DEFAULT_NUM_FRAMES if isinstance(self.config, VideoLlavaConfig) else 1

    @property
    def default_budget(self) -> str:
        """The paper's smallest budget for this family."""
        if isinstance(self.config, LlavaNextConfig):
            return "32tok"
        if not self.has_fixed_crops:
            return "128tok"
        return "17tok" if isinstance(self.config, VideoLlavaConfig) else "64tok"


def clip_l(image_size: int) -> CLIPVisionConfig:
    """Returns the configuration of CLIP ViT-L/14, the vision tower of all families."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
        projection_dim=768,
    )


def _vicuna(size: str, vocab_size: int = 32064) -> LlamaConfig:
    width, mlp_width, num_layers, num_heads = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}[size]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _published(name: str, config: PretrainedConfig, *notes: str) -> BenchModel:
    """A model of ``configs/model``, whose file names the checkpoint."""
    checkpoint = option_values(checkout() / "configs", "model", name)["name_or_path"]
    return BenchModel(name, config, checkpoint, notes=notes)


def _clip_alone() -> BenchModel:
    return BenchModel("clip_l_336", clip_l(336), "openai/clip-vit-large-patch14-336")


def _llava(size: str) -> BenchModel:
    config = family_config("llava", clip_l(336), _vicuna(size), 32000)
    return _published(f"llava15_{size}", config)


def _llava_untuned() -> BenchModel:
    # Assembled: Vicuna's 32000 words and the placeholder.
    config = family_config("llava", clip_l(336), _vicuna("7b", vocab_size=32001), 32000)
    return _published("llava15_7b_untuned", config)


def _llava_next(size: str) -> BenchModel:
    config = family_config("llava_next", clip_l(336), _vicuna(size), 32000, image_grid_pinpoints=pinpoints(336))
    note = (
        "vanilla is Hugging Face's packing: a square image is 5 x 576 = 2880 patches, the number the paper compares"
        " with, and 48 newline tokens"
    )
    return _published(f"llava_next_{size}", config, note)


def _llava_next_mistral() -> BenchModel:
    text = MistralConfig(vocab_size=32064, rope_theta=1e6, max_position_embeddings=32768, sliding_window=None)
    config = family_config("llava_next", clip_l(336), text, 32000, image_grid_pinpoints=pinpoints(336))
    return _published("llava_next_mistral_7b", config)


def _video_llava(name: str, family: str) -> BenchModel:
    config = family_config(family, clip_l(224), _vicuna("7b"), 32000, video_token_index=32001)
    note = "a frame is 257 visual tokens in vanilla, CLS among them: 2056 in 8 frames, where the paper counts 2048"
    return _published(name, config, note)


def _onevision(size: str) -> PretrainedConfig:
    width, mlp_width, num_layers, num_heads, num_groups, vocab_size = {
        "0.5b": (896, 4864, 24, 14, 2, 152000),
        "7b": (3584, 18944, 28, 28, 4, 152128),
    }[size]
    text = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=size == "0.5b",
    )
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    return family_config("llava_onevision", tower, text, 151646, -1, "full", video_token_index=151647)


def _llava_onevision(size: str) -> BenchModel:
    note = "a square image of 1152 pixels: a base crop and nine tiles, 729 + 81 x 82 visual tokens in vanilla"
    return _published(f"llava_onevision_{size.replace('.', '_')}", _onevision(size), note)


def _llava_video() -> BenchModel:
    note = "a frame is 196 visual tokens in vanilla, pooled from 729 patches, and a newline ends the video"
    return replace(_published("llava_video_7b", _onevision("7b"), note), medium="video")


def _mini_gemini(size: str) -> BenchModel:
    # The configuration's own high-resolution tower is the published one. The placeholder is no word of the model's.
    config = family_config("mini_gemini", clip_l(336), _vicuna(size, vocab_size=32000), 32000)
    note = "high_res_tower and mining are the same work in every method: all patches are mined before selection"
    return _published(f"mini_gemini_{size}", config, note)


def _qwen2_5_vl(size: str) -> BenchModel:
    width, mlp_width, num_layers, num_heads, num_groups, vocab_size = {
        "3b": (2048, 11008, 36, 16, 2, 151936),
        "7b": (3584, 18944, 28, 28, 4, 152064),
    }[size]
    text = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_groups,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": size == "3b",
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": width,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    config = qwen2_5_vl_config(text, vision, QWEN_IDS)
    return _published(f"qwen2_5_vl_{size}", config)


def _qwen3_vl(size: str) -> BenchModel:
    width, mlp_width, num_layers, num_heads, depth, tower_width, tower_mlp_width, deeper = {
        "2b": (2048, 6144, 28, 16, 24, 1024, 4096, [5, 11, 17]),
        "4b": (2560, 9728, 36, 32, 24, 1024, 4096, [5, 11, 17]),
        "8b": (4096, 12288, 36, 32, 27, 1152, 4304, [8, 16, 24]),
    }[size]
    text = {
        "vocab_size": 151936,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": size != "8b",
    }
    vision = {
        "depth": depth,
        "hidden_size": tower_width,
        "intermediate_size": tower_mlp_width,
        "num_heads": 16,
        "out_hidden_size": width,
        "deepstack_visual_indexes": deeper,
    }
    return _published(f"qwen3_vl_{size}", qwen3_vl_config(text, vision, QWEN_IDS))


def _internvl3(size: str) -> BenchModel:
    width, mlp_width, num_layers, num_heads, num_groups = {
        "1b": (896, 4864, 24, 14, 2),
        "2b": (1536, 8960, 28, 12, 2),
        "8b": (3584, 18944, 28, 28, 4),
    }[size]
    text = {
        "vocab_size": 151674,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_groups,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    }
    vision = {"attention_bias": True}  # Hugging Face's defaults are its tower's 24 layers
    return _published(f"internvl3_{size}", internvl_config(text, vision, 151667))


SHAPES: dict[str, Callable[[], BenchModel]] = {
    "clip_l_336": _clip_alone,
    "llava15_7b": lambda: _llava("7b"),
    "llava15_13b": lambda: _llava("13b"),
    "llava15_7b_untuned": _llava_untuned,
    "llava_next_7b": lambda: _llava_next("7b"),
    "llava_next_13b": lambda: _llava_next("13b"),
    "llava_next_mistral_7b": _llava_next_mistral,
    "video_llava_7b": lambda: _video_llava("video_llava_7b", "video_llava_published"),
    "video_llava_7b_hf": lambda: _video_llava("video_llava_7b_hf", "video_llava"),
    "llava_onevision_0_5b": lambda: _llava_onevision("0.5b"),
    "llava_onevision_7b": lambda: _llava_onevision("7b"),
    "llava_video_7b": _llava_video,
    "mini_gemini_7b": lambda: _mini_gemini("7b"),
    "mini_gemini_13b": lambda: _mini_gemini("13b"),
    "qwen2_5_vl_3b": lambda: _qwen2_5_vl("3b"),
    "qwen2_5_vl_7b": lambda: _qwen2_5_vl("7b"),
    "qwen3_vl_2b": lambda: _qwen3_vl("2b"),
    "qwen3_vl_4b": lambda: _qwen3_vl("4b"),
    "qwen3_vl_8b": lambda: _qwen3_vl("8b"),
    "internvl3_1b": lambda: _internvl3("1b"),
    "internvl3_2b": lambda: _internvl3("2b"),
    "internvl3_8b": lambda: _internvl3("8b"),
}
TINY = "tiny"
TOWER_TYPES = ("clip_vision_model", "siglip_vision_model")
TINY_DIRECTORY = Path(__file__).resolve().parent.parent / "demo" / "tiny"


def name_of(checkpoint: str) -> str | None:
    """The model of ``configs/model`` whose checkpoint it is; no configuration is built to find it."""
    directory = checkout() / "configs"
    found = (name for name in SHAPES if option_values(directory, "model", name).get("name_or_path") == checkpoint)
    return next(found, None)


def resolve(name: str) -> BenchModel:
    """Finds a shape by name, or reads the configuration of a local checkpoint directory.

    Raises:
        ConfigError: for a name that is neither, with the nearest one.
        CheckpointError: for a directory whose configuration cannot be read.
        UnsupportedModelError: for a directory whose model class is neither of a family nor a vision tower.
    """
    if name in SHAPES:
        return SHAPES[name]()
    directory = TINY_DIRECTORY if name == TINY else Path(name).expanduser()
    if not (directory / "config.json").is_file():
        if name == TINY:
            raise ConfigError(
                f"model=tiny: {directory} holds no config.json; `make tiny` trains it, or choose one of "
                f"{', '.join(SHAPES)}"
            )
        allowed = [TINY, *SHAPES]
        raise ConfigError(
            f"model={name!r} is neither a shape nor a directory with a config.json{nearest(name, allowed)}; "
            f"shapes: {', '.join(allowed)}"
        )
    try:
        config = read_config(directory)
    except CheckpointError as error:  # not JSON, or a model type that transformers does not know
        raise UnsupportedModelError(f"model={name}: {error}") from error
    if config.model_type not in TOWER_TYPES:
        adapter_class_for_config(config)
    return BenchModel(name, config, str(directory), default_weights="pretrained")


class _ParametersOnMeta(TorchFunctionMode):
    """Sends ``torch.empty`` (which all large parameters start as) to the meta device, and leaves the rest where it is.

    So a model's buffers (position indices, rotary frequencies) get their true contents while its weights take no memory
    and their initialisers, which would take minutes on a CPU, do nothing.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _construct(model: BenchModel, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(model.config)  # from_config writes the dtype into what it is given
    auto = AutoModel if model.tower_only else AutoModelForImageTextToText
    built = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return built.eval().requires_grad_(False)


def build_meta(model: BenchModel, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model without contents, to count parameters and operations."""
    with torch.device("meta"):
        return _construct(model, dtype)


def build_random(model: BenchModel, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Builds the model with random weights, directly on the device and in the dtype.

    Weights of variance 1 / fan-in keep activations near one; query and key projections of the tower have twice that, so
    that attention differs clearly from patch to patch, as it does in trained towers, and near ties are rare.

    Args:
        model: what to build.
        device: where.
        dtype: of weights and activations; buffers keep the dtype the model gives them (rotary frequencies: float32).
        seed: of the noise.
    """
    with torch.device(device), _ParametersOnMeta():
        built = _construct(model, dtype)
    buffers = dict(built.named_buffers())
    built.to_empty(device=device)
    built.tie_weights()  # to_empty gives each user of a shared weight its own
    for name, buffer in built.named_buffers():
        buffer.copy_(buffers[name])
    generator = torch.Generator(device=device).manual_seed(seed)
    noise = torch.randn(NOISE_PERIOD, generator=generator, device=device, dtype=torch.float32).to(dtype)
    offset = 0
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 1 and not name.endswith(("class_embedding", "image_newline")):
                parameter.fill_(1.0 if name.endswith(("weight", "layer_scale_parameter")) else 0.0)  # norms; biases
                continue
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            sharpen = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) and "language_model" not in name else 1.0
            _fill_from(parameter, noise, offset, (sharpen / fan_in) ** 0.5)
            offset = (offset + parameter.numel()) % NOISE_PERIOD
    return built


def _fill_from(parameter: torch.Tensor, noise: torch.Tensor, offset: int, scale: float) -> None:
    """Fills a tensor with a repeated, scaled piece of noise: a copy, where drawing 7 billion numbers takes minutes."""
    flat, scaled = parameter.view(-1), noise.roll(-offset) * scale
    whole = flat.numel() // NOISE_PERIOD * NOISE_PERIOD
    flat[:whole].view(-1, NOISE_PERIOD).copy_(scaled.expand(whole // NOISE_PERIOD, NOISE_PERIOD))
    flat[whole:].copy_(scaled[: flat.numel() - whole])
