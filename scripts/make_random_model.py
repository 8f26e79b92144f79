"""Writes a small random checkpoint of a family, with the images, patches and crops of the published ones.

It answers nonsense, but in the true class, through the true processor and with the true numbers of visual tokens, in
seconds and without a download: for trying commands, and for tests.

python scripts/make_random_model.py video_llava runs/random/video_llava
python eval.py model=llava_local model.name_or_path=runs/random/video_llava budget=17tok eval=scenes eval.limit=8
python -m vzip ask clip.mp4 "What happens?" --model llava_local model.name_or_path=runs/random/video_llava budget=17tok
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    Qwen2Config,
    SiglipVisionConfig,
)

from vzip import log
from vzip.compressors.base import check_seed
from vzip.errors import ConfigError, RunExistsError, VzipError, nearest
from vzip.models.load import resolve_checkpoint
from vzip.models.weights import from_config as fresh
from vzip.models.weights.from_config import FAMILIES

WIDTH, NUM_LAYERS, NUM_HEADS = 32, 4, 4
PATCH_SIZE = 14
# Pixels of a crop or frame, as in the published checkpoints.
SIDES = {
    "llava": 336,
    "llava_next": 336,
    "llava_onevision": 384,
    "video_llava": 224,
    "video_llava_published": 224,
    "mini_gemini": 336,
}
IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for item in message['content'] if item['type'] != 'text' %}<{{ item['type'] }}>\n{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# LLaVA-OneVision's is Qwen2's (ChatML).
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for item in message['content'] if item['type'] != 'text' %}<{{ item['type'] }}>\n{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_KEPT_OF_LLAMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
_KEPT_OF_LLAMA += ("num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id")
# By Hugging Face's names of their ids.
QWEN_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
# ChatML, as Qwen's own.
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}"
    "{% else %}<|vision_start|><|{{ item['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In place of the tokenizer's own, as InternVL3's; its template leaves out what stands around an image.
INTERNVL_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"]
INTERNVL_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}"
    "{% else %}{{ '<IMG_CONTEXT>\n' if item['type'] == 'image' else '<video>\n' }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vision_config(side: int, kind: Any = CLIPVisionConfig) -> Any:
    """A narrow tower for square images of ``side`` pixels."""
    return kind(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        image_size=side,
        patch_size=PATCH_SIZE,
    )


def family_config(family: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The configuration of a family's small model, for a tokenizer with its placeholders."""
    of_video = {"video_token_index": tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)}
    of_family: dict[str, dict[str, Any]] = {
        "llava": {},
        "llava_next": {"image_grid_pinpoints": fresh.pinpoints(SIDES["llava_next"])},
        "llava_onevision": {
            "video_token_index": tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
            "select_layer": -1,
            "select_strategy": "full",
        },
        "video_llava": of_video,
        "video_llava_published": of_video,
        "mini_gemini": {
            "high_res_config": ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 1, 1]),
            "high_res_image_size": 768,
        },
    }
    text: Any = _text_config(tokenizer)
    if family == "llava_onevision":
        text = Qwen2Config(**{name: value for name, value in text.to_dict().items() if name in _KEPT_OF_LLAMA})
    return fresh.family_config(
        family,
        vision_config(SIDES[family], SiglipVisionConfig if family == "llava_onevision" else CLIPVisionConfig),
        text,
        int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        **of_family[family],
    )


def qwen2_5_vl_config(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The same of Qwen2.5-VL, for a tokenizer with ``QWEN_TOKENS``."""
    text = _text_config(tokenizer).to_dict()
    heads = {"num_attention_heads": NUM_HEADS // 2, "num_key_value_heads": NUM_HEADS // 2}
    vision = {
        "depth": NUM_LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": NUM_HEADS,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH_SIZE,
        "window_size": 112,
        "fullatt_block_indexes": [1, NUM_LAYERS - 1],
    }
    tokens = {name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in QWEN_TOKENS.items()}
    return fresh.qwen2_5_vl_config({**{name: text[name] for name in _KEPT_OF_LLAMA}, **heads}, vision, tokens)


def qwen3_vl_config(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The same of Qwen3-VL."""
    like = qwen2_5_vl_config(tokenizer).to_dict()
    text = {**{name: like["text_config"][name] for name in _KEPT_OF_LLAMA}, "head_dim": WIDTH // 2}
    vision = {
        "depth": NUM_LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": NUM_HEADS,
        "out_hidden_size": WIDTH,
        "patch_size": 16,
        "deepstack_visual_indexes": [0, NUM_LAYERS - 2],
    }
    return fresh.qwen3_vl_config(text, vision, {name: like[name] for name in QWEN_TOKENS})


def internvl_config(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The same of InternVL3, for a tokenizer with ``INTERNVL_TOKENS``."""
    text = _text_config(tokenizer).to_dict()
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "attention_bias": True,
    }
    image_token_id = int(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    return fresh.internvl_config({name: text[name] for name in _KEPT_OF_LLAMA}, vision, image_token_id)


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A random model in eval mode, float32, and its processor.

    Args:
        family: one of ``FAMILIES``.
        seed: of the weights.

    Raises:
        ConfigError: another family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family={family}: must be one of {', '.join(FAMILIES)}{nearest(family, FAMILIES)}.")
    tokenizer = _tokenizer()
    if family in (fresh.QWEN2_5_VL, fresh.QWEN3_VL):
        tokenizer.add_tokens(["<|im_start|>", *QWEN_TOKENS.values()], special_tokens=True)
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
        of_family = qwen2_5_vl_config if family == fresh.QWEN2_5_VL else qwen3_vl_config
        config, template = of_family(tokenizer), QWEN_CHAT_TEMPLATE
    elif family == fresh.INTERNVL:
        tokenizer.add_tokens(INTERNVL_TOKENS, special_tokens=True)
        tokenizer.eos_token = "<|im_end|>"
        config, template = internvl_config(tokenizer), INTERNVL_CHAT_TEMPLATE
    else:
        if family == "llava_onevision":
            tokenizer.add_tokens(list(CHATML_TOKENS), special_tokens=True)
        config = family_config(family, tokenizer)
        template = CHATML_TEMPLATE if family == "llava_onevision" else CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = fresh.new_model(config)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model.eval(), fresh.new_processor(config, tokenizer, template)


def save(family: str, directory: Path, seed: int = 0) -> None:
    """Writes a checkpoint directory as ``save_pretrained`` does.

    Raises:
        ConfigError: another family.
        RunExistsError: the directory is there and not empty.
    """
    check_seed(seed, "--seed")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunExistsError(f"{directory}: is there already and not empty; choose another directory.")
    model, processor = build(family, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _tokenizer() -> PreTrainedTokenizerBase:
    """The built-in model's, with the placeholders."""
    tokenizer = LlavaProcessor.from_pretrained(resolve_checkpoint("vzip/tiny")).tokenizer
    tokenizer.add_tokens([VIDEO_TOKEN], special_tokens=True)
    return tokenizer


def _text_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=32768,  # eighty frames without compression are 20560 tokens
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help=", ".join(FAMILIES))
    parser.add_argument("directory", type=Path, help="must not exist yet, or be empty")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    arguments = parser.parse_args()
    log.setup()
    try:
        save(arguments.family, arguments.directory, arguments.seed)
    except VzipError as error:
        return log.tell_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
