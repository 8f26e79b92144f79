"""The processor of a published Mini-Gemini: images, prompts and the conversation as MGM's evaluation scripts."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPVisionConfig, LlavaProcessor
from transformers.models.clip import CLIPImageProcessor  # AutoImageProcessor of 5.17 insists on torchvision

from ..original.tokenizer import llama_tokenizer, vicuna_template


def build_processor(directory: Path, clip_directory: Path, side: int, vocab_size: int) -> LlavaProcessor:
    """High-resolution image processor with the CLIP tower's means, Vicuna's tokenizer with a placeholder.

    Args:
        directory: of the checkpoint, with ``tokenizer.model``.
        clip_directory: of the low-resolution tower, with ``preprocessor_config.json``.
        side: pixels of the square image.
        vocab_size: words of the language model; ``<image>`` gets the id after them.

    Raises:
        CheckpointError: the tokenizer has another number of words.
    """
    clip = CLIPVisionConfig.from_pretrained(clip_directory, trust_remote_code=False)
    return LlavaProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(
            clip_directory, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=llama_tokenizer(directory, vocab_size, ["<image>"]),
        patch_size=side // (clip.image_size // clip.patch_size),  # pixels of the image for each visual token
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=vicuna_template(),
    )
