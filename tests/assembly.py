"""Two small models of unusual sizes in directories of their own, to be put together: a tower and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip import CLIPImageProcessor

IMAGE_SIDE = 96


def save_tower(directory: Path, kind: Literal["clip", "siglip"], with_processor: bool = True) -> None:
    """A tower of 6 x 6 patches of 16 pixels, five layers, width 48; a CLIP brings its text tower along."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    vision = {**sizes, "num_hidden_layers": 5, "image_size": IMAGE_SIDE, "patch_size": 16}
    square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    if kind == "clip":
        text = {**sizes, "num_hidden_layers": 1, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
        CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).save_pretrained(directory)
        processor: Any = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIDE}, crop_size=square)
    else:
        SiglipVisionModel(SiglipVisionConfig(**vision)).save_pretrained(directory)
        processor = SiglipImageProcessor(size=square)
    if with_processor:
        processor.save_pretrained(directory)


def save_language_model(
    directory: Path, tied: bool, dtype: torch.dtype = torch.float32, eos_token: str | None = "<|endoftext|>"
) -> None:
    """A Llama with grouped heads, its tokenizer one of bytes, without padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokens = Tokenizer(models.BPE(vocabulary, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=eos_token).save_pretrained(directory)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
