"""The models a measurement can be made on, and how to build them without downloading anything.

Time and memory depend on shapes and not on what the weights say, so the true 7B and 13B shapes can be measured with
random weights. They are built on the target device in the target dtype, with no float32 copy on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from vzip.errors import ConfigError, UnsupportedModelError, nearest

NOISE_PERIOD = 1_048_573  # a prime just under 2**20: rows of a matrix, whose lengths are composite, then all differ


@dataclass(frozen=True)
class BenchModel:
    """What to measure.

    Attributes:
        name: as the user wrote it.
        config: a ``LlavaConfig``, or a vision configuration where the tower is measured alone.
        checkpoint: directory or hub id that ``weights=pretrained`` loads.
        num_crops: default number of tower inputs in a prompt.
        default_weights: ``random`` for bare shapes, ``pretrained`` for directories and the shipped model.
        approximations: how this shape differs from the model it stands for, one sentence each.
    """

    name: str
    config: PretrainedConfig
    checkpoint: str
    num_crops: int = 1
    default_weights: str = "random"
    approximations: tuple[str, ...] = ()

    @property
    def tower_only(self) -> bool:
        """Whether there is no language model to measure."""
        return not isinstance(self.config, LlavaConfig)

    @property
    def vision_config(self) -> PretrainedConfig:
        """The vision tower's configuration."""
        return self.config if self.tower_only else self.config.vision_config


def clip_l_336() -> CLIPVisionConfig:
    """Returns the configuration of CLIP ViT-L/14-336, LLaVA's vision tower."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _llava(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(
        vision_config=clip_l_336(),
        text_config=text,
        image_token_id=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_7b() -> LlavaConfig:
    return _llava(4096, 11008, 32, 32)


SHAPES: dict[str, Callable[[], BenchModel]] = {
    "clip_l_336": lambda: BenchModel("clip_l_336", clip_l_336(), "openai/clip-vit-large-patch14-336"),
    "llava15_7b": lambda: BenchModel("llava15_7b", _llava_7b(), "llava-hf/llava-1.5-7b-hf"),
    "llava15_13b": lambda: BenchModel("llava15_13b", _llava(5120, 13824, 40, 40), "llava-hf/llava-1.5-13b-hf"),
    "llava_next_7b": lambda: BenchModel(
        "llava_next_7b",
        _llava_7b(),
        "llava-hf/llava-1.5-7b-hf",
        num_crops=5,
        approximations=(
            "LLaVA-NeXT-7B is stood for by the LLaVA-1.5-7B shape reading 5 crops a prompt (2880 visual tokens, the "
            "number the paper compares with)",
            "the newline tokens and the cropping of padded tiles of LLaVA-NeXT's packing are left out",
        ),
    ),
}
TINY = "tiny"
MEASURED = (
    "the bench measures llava, clip_vision_model and siglip_vision_model, and LLaVA-NeXT as the shape llava_next_7b;"
    " not Video-LLaVA, whose frames have a tower of their own, nor Mini-Gemini, which mines patches before selection"
)
_NOT_MEASURED = ("video_llava", "mini_gemini")
TINY_DIRECTORY = Path(__file__).resolve().parent.parent / "demo" / "tiny"


def resolve(name: str) -> BenchModel:
    """Finds a shape by name, or reads the configuration of a local checkpoint directory.

    Raises:
        ConfigError: for a name that is neither, with the nearest one.
        UnsupportedModelError: for a directory whose model class is neither LLaVA nor a vision tower, and for a family
            that is not measured.
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
        if name.startswith(_NOT_MEASURED):
            raise UnsupportedModelError(f"model={name}: {MEASURED}")
        allowed = [TINY, *SHAPES]
        raise ConfigError(
            f"model={name!r} is neither a shape nor a directory with a config.json{nearest(name, allowed)}; "
            f"shapes: {', '.join(allowed)}"
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except ValueError as error:  # a model type that transformers does not know, as the published Mini-Gemini's
        raise UnsupportedModelError(f"model={name}: {str(error).splitlines()[0]} {MEASURED}") from error
    if type(config) is not LlavaConfig and config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(f"model={name}: {directory} holds a {config.model_type!r}; {MEASURED}")
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
            if parameter.ndim == 1 and "class_embedding" not in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # normalisations; biases
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
