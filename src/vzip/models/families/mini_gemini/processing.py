"""The processor of a published Mini-Gemini: images, prompts and the conversation as MGM's evaluation scripts."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPVisionConfig, LlamaTokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip import CLIPImageProcessor  # AutoImageProcessor of 5.17 insists on torchvision

from vzip.errors import CheckpointError

# Conversation "v1" (Vicuna) of the published code; the system text, if any, is the caller's.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %} "
    "{% else %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


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
        tokenizer=_tokenizer(directory, vocab_size),
        patch_size=side // (clip.image_size // clip.patch_size),  # pixels of the image for each visual token
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(directory: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    # legacy: each text between two placeholders begins with a blank, as where MGM tokenizes them one by one. The
    # general class around it, since LlamaTokenizer forgets that setting when it is saved.
    vicuna = LlamaTokenizer.from_pretrained(directory, legacy=True, trust_remote_code=False)
    if len(vicuna) != vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {len(vicuna)} words, but config.json says vocab_size={vocab_size}; they"
            " must be equal. One of them is of another checkpoint."
        )
    vicuna.add_tokens(["<image>"], special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=vicuna.backend_tokenizer,
        bos_token=vicuna.bos_token,
        eos_token=vicuna.eos_token,
        unk_token=vicuna.unk_token,
        pad_token=vicuna.pad_token,
        padding_side="left",
        model_max_length=vicuna.model_max_length,
        extra_special_tokens={"image_token": "<image>"},
    )
