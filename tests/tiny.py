"""Tiny random models and their processor, built in a second from configuration objects; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    VideoLlavaImageProcessor,
)
from transformers.models.clip import CLIPImageProcessor

IMAGE_SIZE = 112
PATCH_SIZE = 14
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2  # 64
IMAGE_TOKEN = 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
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


def text_config(vocab_size: int) -> LlamaConfig:
    """A two-layer Llama of width 32."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
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


def llava(
    tower: Literal["clip", "siglip"] = "clip",
    strategy: Literal["default", "full"] = "default",
    select_layer: Any = -2,
    num_layers: int = 4,
    vocab_size: int = 64,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A LLaVA of about 60 thousand parameters in eval mode, float32."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision_config(tower, num_layers),
        text_config=text_config(vocab_size),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=strategy,
    )
    return finish(LlavaForConditionalGeneration(config), tower)


# As the released checkpoints', for crops of 112 instead of 336 pixels.
PINPOINTS = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]


def llava_next(
    tower: Literal["clip", "siglip"] = "clip",
    strategy: Literal["default", "full"] = "default",
    select_layer: Any = -2,
    vocab_size: int = 64,
    seed: int = 7,  # a model that does not just repeat one token
) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT of the same parts."""
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=vision_config(tower),
        text_config=text_config(vocab_size),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=strategy,
    )
    return finish(LlavaNextForConditionalGeneration(config), tower)


def pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    """[num_images, 3, 112, 112]."""
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


# (height, width) of pictures in turn and the crops that Hugging Face makes of each; no ties between resolutions.
NEXT_SIZES = [(224, 224), (100, 330), (200, 110), (180, 240)]
NEXT_CROPS = [5, 4, 3, 5]


def llava_inputs(num_images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a processor returns for ``num_images`` pictures."""
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


@dataclass(frozen=True)
class Family:
    """What the parity tests need of a family.

    Attributes:
        name: as in ``configs/model`` and ``tests/golden``.
        build: a tiny model; takes ``tower``, ``strategy`` and ``select_layer``.
        inputs: number of pictures (and a seed) -> keyword arguments of ``prepare``.
        kinds: (tower, select strategy) that the family allows.
        crops: crops of picture 0, 1, ... as ``inputs`` makes them, in turn.
        config_class: Hugging Face's.
    """

    name: str
    build: Callable[..., Any]
    inputs: Callable[..., dict[str, torch.Tensor]]
    kinds: tuple[tuple[str, str], ...]
    crops: tuple[int, ...]
    config_class: Any

    def num_crops(self, num_images: int) -> list[int]:
        return [self.crops[number % len(self.crops)] for number in range(num_images)]

    def stock_lengths(self, model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
        """Visual tokens of each picture in the unmodified model, by its own computation."""
        with torch.no_grad():
            return [len(image) for image in model.model.get_image_features(**inputs).pooler_output]

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
    ),
    Family(
        name="llava_next_tiny",
        build=llava_next,
        inputs=next_inputs,
        kinds=(("clip", "default"), ("siglip", "full")),
        crops=tuple(NEXT_CROPS),
        config_class=LlavaNextConfig,
    ),
)


def some_of(inputs: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """The inputs of pictures start..stop alone; none: no inputs."""
    return {key: value[start:stop] for key, value in inputs.items()} if stop > start else {}


def next_processor() -> LlavaNextProcessor:
    """LLaVA-NeXT's processor over the same tokenizer."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=processor().tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def processor() -> LlavaProcessor:
    """A byte-level tokenizer with <image> as one token, CLIP's image processor at 112 px, a chat template."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["what is it?"], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def video_image_processor() -> VideoLlavaImageProcessor:
    """Video-LLaVA's image processor at 112 pixels."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return VideoLlavaImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
