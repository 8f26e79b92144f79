"""Tiny random models and their processor, built in a second from configuration objects; nothing is downloaded."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
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
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None  # never stop early: every token is compared
    model.generation_config.pad_token_id = 3
    sharpen(model, tower)
    return model


def pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    """[num_images, 3, 112, 112]."""
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


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
