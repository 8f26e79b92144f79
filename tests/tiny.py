"""Tiny random models and their processor, built in a second from configuration objects; nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)

from vzip.models.weights import from_config as fresh

IMAGE_SIZE = 112
PATCH_SIZE = 14
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2  # 64
IMAGE_TOKEN = 4
VIDEO_TOKEN = 63  # the last of the small vocabulary, so that prompts may use the ids from 5 on
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'video') %}<{{ c['type'] }}>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %} {% endfor %}"
)


def vision_config(tower: Literal["clip", "siglip"], num_layers: int = 4) -> Any:
    """A 64-patch tower of width 32 with 4 heads."""
    kind = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    return kind(
        hidden_size=32,
        intermediate_size=80,  # no other size may look like an attention map's (64 or 65)
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )


def sharpen(model: torch.nn.Module, tower: Literal["clip", "siglip"]) -> None:
    """Makes random attention peaked, so that rankings have no near-ties and outputs depend on every input."""
    factor = 12.0 if tower == "clip" else 3.0  # SigLIP starts from larger weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(factor)
            elif "language_model" in name and parameter.ndim == 2:
                parameter.mul_(4.0)


def text_config(vocab_size: int, num_layers: int = 2) -> LlamaConfig:
    """A small Llama of width 32."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )


def finish(model: Any, tower: Literal["clip", "siglip"]) -> Any:
    """Eval mode, peaked attention, generation that never stops early (every token is compared)."""
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 3
    sharpen(model, tower)
    return model


def build(
    family: str,
    tower: Literal["clip", "siglip"] = "clip",
    strategy: Literal["default", "full"] = "default",
    select_layer: Any = -2,
    num_layers: int = 4,
    vocab_size: int = 64,
    num_text_layers: int = 2,
    seed: int = 7,  # models that do not just repeat one token
    **of_family: Any,
) -> Any:
    """A family's model of about 60 thousand parameters in eval mode, float32."""
    vision, text = vision_config(tower, num_layers), text_config(vocab_size, num_text_layers)
    torch.manual_seed(seed)
    config = fresh.family_config(family, vision, text, IMAGE_TOKEN, select_layer, strategy, **of_family)
    return finish(fresh.new_model(config), tower)


# As the released checkpoints', for crops of 112 instead of 336 pixels.
PINPOINTS = fresh.pinpoints(IMAGE_SIZE)


def llava(*kind: Any, **settings: Any) -> LlavaForConditionalGeneration:
    """A LLaVA; arguments as for ``build``."""
    return build("llava", *kind, **{"seed": 0, **settings})


def llava_next(*kind: Any, **settings: Any) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT of the same parts."""
    return build("llava_next", *kind, image_grid_pinpoints=PINPOINTS, **settings)


def video_llava(*kind: Any, video_token: int = VIDEO_TOKEN, **settings: Any) -> VideoLlavaForConditionalGeneration:
    """A Video-LLaVA of the same parts, with a tower for images and one for videos."""
    return build("video_llava", *kind, video_token_index=video_token, **settings)


def llava_onevision(*kind: Any, video_token: int = VIDEO_TOKEN, **settings: Any) -> Any:
    """A LLaVA-OneVision of the same parts, which shrinks the mosaic of an image of more than three tiles."""
    of_family = {"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": "anyres_max_3"}
    own = {"tower": "siglip", "strategy": "full", "select_layer": -1, "seed": 2, **of_family, **settings}
    own |= dict(zip(("tower", "strategy", "select_layer"), kind, strict=False))
    return build("llava_onevision", video_token_index=video_token, **own)


def pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    """[num_images, 3, 112, 112]."""
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


# (height, width) of images in turn and the crops that Hugging Face makes of each; no ties between resolutions.
NEXT_SIZES = [(224, 224), (100, 330), (200, 110), (180, 240)]
NEXT_CROPS = [5, 4, 3, 5]


def llava_inputs(num_images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a processor returns for ``num_images`` images."""
    return {"pixel_values": pixels(num_images, seed)}


def next_inputs(num_images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same for LLaVA-NeXT: [images, 5, 3, 112, 112], zero-padded, and the sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(num_images, 5, 3, IMAGE_SIZE, IMAGE_SIZE)
    for number in range(num_images):
        count = NEXT_CROPS[number % 4]
        values[number, :count] = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    sizes = torch.tensor([NEXT_SIZES[number % 4] for number in range(num_images)])
    return {"pixel_values": values, "image_sizes": sizes}


NUM_FRAMES = 3


def video_inputs(num_videos: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a processor returns for ``num_videos`` videos of three frames."""
    frames = pixels(num_videos * NUM_FRAMES, seed)
    return {"pixel_values_videos": frames.view(num_videos, NUM_FRAMES, *frames.shape[1:])}


@dataclass(frozen=True)
class Family:
    """What the parity tests need of a family; one whose images are videos has ``medium="video"``.

    Attributes:
        name: of the test, and of the folder in ``tests/golden``.
        build: a tiny model; takes ``tower``, ``strategy`` and ``select_layer``.
        inputs: number of images (and a seed) -> keyword arguments of ``prepare``.
        kinds: (tower, select strategy) that the family allows.
        crops: crops of image 0, 1, ... as ``inputs`` makes them, in turn.
        config_class: Hugging Face's.
        medium: ``image`` or ``video``.
        published: whether ``tests/golden`` holds what the published code computes.
        pools: whether a method chooses among patches pooled after the projector, and a newline ends the video.
    """

    name: str
    build: Callable[..., Any]
    inputs: Callable[..., dict[str, torch.Tensor]]
    kinds: tuple[tuple[str, str], ...]
    crops: tuple[int, ...]
    config_class: Any
    medium: Literal["image", "video"] = "image"
    published: bool = False
    pools: bool = False

    @property
    def num_added(self) -> int:
        """Newlines beside the compressed tokens."""
        return int(self.pools)

    @property
    def token(self) -> int:
        """Id of the placeholder."""
        return VIDEO_TOKEN if self.medium == "video" else IMAGE_TOKEN

    @property
    def pixels_name(self) -> str:
        """The one of ``inputs`` that holds pixels."""
        return "pixel_values_videos" if self.medium == "video" else "pixel_values"

    def encode(self, vlm: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Visual tokens of each image."""
        return vlm.encode_videos(**inputs) if self.medium == "video" else vlm.encode_images(**inputs)

    def tower(self, vlm: Any) -> Any:
        """The vision tower that reads the images."""
        return vlm.adapter.frame_tower if self.medium == "video" else vlm.adapter.tower

    def num_crops(self, num_images: int) -> list[int]:
        return [self.crops[number % len(self.crops)] for number in range(num_images)]

    def stock_lengths(self, model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
        """Visual tokens of each image in the unmodified model, by its own computation."""
        with torch.no_grad():
            if self.medium == "video" and self.config_class is LlavaOnevisionConfig:
                return [len(video) for video in model.model.get_video_features(**inputs).pooler_output]
            if self.medium == "video":
                frames = model.model.get_video_features(**inputs).pooler_output
                return [len(video.flatten(0, 1)) for video in frames.view(-1, NUM_FRAMES, *frames.shape[1:])]
            return [len(image) for image in model.model.get_image_features(**self.stock(inputs)).pooler_output]

    def stock(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs by the names that Hugging Face's class has for them in the version installed."""
        parameters = inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
        if self.config_class is VideoLlavaConfig and self.medium == "image" and "pixel_values" not in parameters:
            return {"pixel_values_images": inputs["pixel_values"]}
        return inputs

    def __str__(self) -> str:
        return self.name


FAMILIES = (
    Family(
        name="llava15_tiny",
        build=llava,
        inputs=llava_inputs,
        kinds=(("clip", "default"), ("clip", "full"), ("siglip", "default"), ("siglip", "full")),
        crops=(1,),
        config_class=LlavaConfig,
        published=True,
    ),
    Family(
        name="llava_next_tiny",
        build=llava_next,
        inputs=next_inputs,
        kinds=(("clip", "default"), ("siglip", "full")),
        crops=tuple(NEXT_CROPS),
        config_class=LlavaNextConfig,
        published=True,
    ),
    Family(
        name="video_llava_tiny_pictures",
        build=video_llava,
        inputs=llava_inputs,
        kinds=(("clip", "default"), ("clip", "full"), ("siglip", "full")),
        crops=(1,),
        config_class=VideoLlavaConfig,
    ),
    Family(
        name="video_llava_tiny_videos",
        build=video_llava,
        inputs=video_inputs,
        kinds=(("clip", "default"), ("siglip", "full")),
        crops=(NUM_FRAMES,),
        config_class=VideoLlavaConfig,
        medium="video",
    ),
    Family(
        name="llava_onevision_tiny_pictures",
        build=llava_onevision,
        inputs=next_inputs,
        kinds=(("siglip", "full"),),
        crops=tuple(NEXT_CROPS),
        config_class=LlavaOnevisionConfig,
    ),
    Family(
        name="llava_onevision_tiny_videos",
        build=llava_onevision,
        inputs=video_inputs,
        kinds=(("siglip", "full"),),
        crops=(NUM_FRAMES,),
        config_class=LlavaOnevisionConfig,
        medium="video",
        pools=True,
    ),
)


def some_of(inputs: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """The inputs of images start..stop alone; none: no inputs."""
    return {key: value[start:stop] for key, value in inputs.items()} if stop > start else {}


def tokenizer(*more_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with <image> as one token (id 4), and ``more_tokens`` (5, ...)."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *more_tokens]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["what is it?"], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


@cache
def _config(family: str) -> Any:
    """The configuration of a family's model, for its processor."""
    builders = {
        "llava": llava,
        "llava_next": llava_next,
        "llava_onevision": llava_onevision,
        "video_llava": video_llava,
    }
    return builders[family]().config


def processor() -> LlavaProcessor:
    """The tokenizer, CLIP's image processor at 112 px, a chat template."""
    return fresh.new_processor(_config("llava"), tokenizer(), CHAT_TEMPLATE)


def next_processor() -> LlavaNextProcessor:
    """LLaVA-NeXT's processor over the same tokenizer."""
    return fresh.new_processor(_config("llava_next"), tokenizer(), CHAT_TEMPLATE)


def video_image_processor() -> VideoLlavaImageProcessor:
    """Video-LLaVA's image processor at 112 pixels."""
    return fresh.new_image_processor(_config("video_llava"))


def onevision_processor() -> LlavaProcessor:
    """What ``LlavaOnevisionAdapter.load_processor`` returns, likewise."""
    return fresh.new_processor(_config("llava_onevision"), tokenizer("<video>"), CHAT_TEMPLATE)


def video_processor() -> LlavaProcessor:
    """What ``VideoLlavaAdapter.load_processor`` returns: the same tokenizer with <video> (id 5)."""
    return fresh.new_processor(_config("video_llava"), tokenizer("<video>"), CHAT_TEMPLATE)
