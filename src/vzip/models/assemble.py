"""A LLaVA put together from a vision tower and a language model that have never met.

The projector between them is new and knows nothing: it is what training is for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
)
from transformers.models.clip import CLIPImageProcessor  # AutoImageProcessor of 5.17 insists on torchvision

from vzip.compressors.base import check_seed
from vzip.errors import CheckpointError, ConfigError, UnsupportedModelError

from .families import Adapter, adapter_class_for_config
from .freeze import initialise_anew
from .hub import Checkpoint
from .load import check_complete, reach, resolve_checkpoint
from .towers.structure import geometry_from_config
from .weights.from_config import family_config, new_processor
from .weights.tuned import atomic_directory

logger = logging.getLogger(__name__)

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
# Vicuna v1, as train.template=vicuna_v1 writes it; EOS is put in.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% elif message['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
    "{% for item in message['content'] if item['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ ' ASSISTANT:' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'EOS' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
)
# Before a language model's own template, which takes words alone: a message's parts in their order as one text.
PARTS_AS_TEXT = (
    "{% set joined = namespace(messages=[], text='') %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set joined.text = message['content'] %}"
    "{% else %}{% set joined.text = '' %}{% for item in message['content'] %}"
    "{% set joined.text = joined.text + ('<image>\n' if item['type'] == 'image' else item['text']) %}"
    "{% endfor %}{% endif %}"
    "{% set joined.messages = joined.messages + [dict(message, content=joined.text)] %}"
    "{% endfor %}"
    "{% set messages = joined.messages %}"
)
Template = Literal["own", "vicuna"]


@dataclass(frozen=True)
class Assembled:
    """What was made.

    Attributes:
        num_visual_tokens: of an image, uncompressed.
        template: whose chat template it has.
    """

    num_visual_tokens: int
    template: Template


def assemble(
    tower: str | Path, language_model: str | Path, out: Path, seed: int = 0, template: Template | None = None
) -> Assembled:
    """Writes a LLaVA checkpoint directory: both models' weights as they are, a new projector, one processor.

    The tokenizer gets the placeholder and, where it has none, a padding token; the text embedding grows by their rows.

    Args:
        tower: directory or hub id of a CLIP or SigLIP, its vision tower alone or with its text tower.
        language_model: directory or hub id of a causal language model with a fast tokenizer.
        out: must not exist yet, or be empty.
        seed: of the projector's weights.
        template: the chat template: the language model's ``"own"``, before which each message's images and words are
            joined; or Vicuna's; None: its own where it has one.

    Raises:
        CheckpointError: a model that cannot be read, ``out`` that holds something or cannot be written.
        ConfigError: ``template="own"`` of a language model that has none.
        UnsupportedModelError: a vision tower, language model or tokenizer that cannot be served.
    """
    check_seed(seed, "--seed")
    if Path(language_model).suffix == ".gguf" or list(Path(language_model).glob("*.gguf")):
        raise UnsupportedModelError(
            f"{language_model}: a GGUF file. Convert it to a directory of transformers' first (pip install gguf; python"
            ' -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; M.from_pretrained(FOLDER,'
            ' gguf_file=FILE).save_pretrained(DIR); T.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(DIR)"),'
            " or take the original weights, which are not quantized."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; name a new directory.")
    given = [Checkpoint(resolve_checkpoint(name)) for name in (tower, language_model)]
    tower_dir, text_dir = [checkpoint.directory for checkpoint in given]
    vision_config = _vision_config(tower_dir)
    geometry = geometry_from_config(vision_config)
    image_processor, tokenizer = _image_processor(tower_dir, geometry.has_cls), _tokenizer(text_dir)
    own = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template == "own" and own is None:
        raise ConfigError(f"--template own: {language_model} has no chat template. Use --template vicuna.")
    if own is None or template == "vicuna":
        template, chat_template = "vicuna", CHAT_TEMPLATE.replace("EOS", str(tokenizer.eos_token))
    else:
        template, chat_template = "own", PARTS_AS_TEXT + own
    for checkpoint in given:
        checkpoint.fetch_weights()
    text, report = reach(
        text_dir,
        lambda: AutoModelForCausalLM.from_pretrained(
            text_dir, dtype="auto", output_loading_info=True, trust_remote_code=False
        ),
    )
    check_complete(text_dir, report)
    vision, report = reach(
        tower_dir,
        lambda: AutoModel.from_pretrained(
            tower_dir, config=vision_config, dtype=text.dtype, output_loading_info=True, trust_remote_code=False
        ),
    )
    check_complete(tower_dir, report, not_wanted=r"text_model\.|text_projection|visual_projection|logit_(scale|bias)")

    config = family_config(
        "llava",
        vision_config,
        text.config,
        tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        select_strategy="default" if geometry.has_cls else "full",
        tie_word_embeddings=text.config.tie_word_embeddings,
        image_seq_length=geometry.num_patches,
    )
    adapter_class = adapter_class_for_config(config)
    adapter_class.check_config(config)
    with torch.device("meta"):  # weights are taken over, not copied
        model: Any = adapter_class.model_class(config)
    adapter = adapter_class(model)
    _take_over(adapter, vision, text)
    adapter.projector.to_empty(device="cpu").to(text.dtype)
    torch.manual_seed(seed)
    initialise_anew(adapter.projector)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    text.generation_config.update(pad_token_id=tokenizer.pad_token_id)
    processor = new_processor(config, tokenizer, chat_template, image_processor)
    with atomic_directory(out) as work:
        model.save_pretrained(work)
        text.generation_config.save_pretrained(work)
        processor.save_pretrained(work)
    return Assembled(geometry.num_patches, template)


def _vision_config(tower: Path) -> Any:
    config = reach(tower, lambda: AutoConfig.from_pretrained(tower, trust_remote_code=False))
    return getattr(config, "vision_config", config)


def _tokenizer(language_model: Path) -> PreTrainedTokenizerBase:
    """The language model's, with the placeholder and a padding token.

    Raises:
        UnsupportedModelError: it cannot end an answer, or not tell which characters a token covers.
    """
    tokenizer = reach(language_model, lambda: AutoTokenizer.from_pretrained(language_model, trust_remote_code=False))
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{language_model}: its tokenizer {'has no end token' if tokenizer.is_fast else 'is a slow one'}; training"
            " needs a fast tokenizer (tokenizer.json) with an eos_token."
        )
    missing = [token for token in (IMAGE_TOKEN, PAD_TOKEN) if token == IMAGE_TOKEN or tokenizer.pad_token is None]
    tokenizer.add_tokens(missing, special_tokens=True)
    if PAD_TOKEN in missing:
        tokenizer.pad_token = PAD_TOKEN
    return tokenizer


def _take_over(adapter: Adapter, vision: nn.Module, text: Any) -> None:
    """Puts both models' weights into the empty model.

    Raises:
        UnsupportedModelError: the language model is of a kind that LLaVA's class does not hold.
    """
    parts = [
        (adapter.vision_tower, vision),
        (adapter.language_model, text.base_model),
        (adapter.model.get_output_embeddings(), text.get_output_embeddings()),
    ]
    for own, given in parts:
        if type(own) is not type(given):
            raise UnsupportedModelError(
                f"{type(text).__name__}: LLaVA would hold it as {type(own).__name__}, but it is a"
                f" {type(given).__name__}. Take a causal language model, such as a Llama."
            )
        own.load_state_dict(given.state_dict(), assign=True)
    adapter.model.tie_weights()


def _image_processor(tower: Path, is_clip: bool) -> Any:
    """The tower's own; None where it has none and CLIP's usual one will do.

    Raises:
        CheckpointError: a SigLIP without one, whose constants are not known.
    """
    kind = CLIPImageProcessor if is_clip else SiglipImageProcessor
    try:
        return kind.from_pretrained(tower)
    except OSError as error:
        if is_clip:
            logger.warning("%s has no image processor; CLIP's mean and deviation are taken.", tower)
            return None
        raise CheckpointError(
            f"{tower}: holds no preprocessor_config.json, which says how images enter a SigLIP."
        ) from error
