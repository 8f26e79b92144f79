"""LLaVA's prompts: a LLaMA tokenizer with placeholders, and the conversations of LLaVA's code as chat templates."""

from __future__ import annotations

import collections.abc
from pathlib import Path

from tokenizers.normalizers import Prepend, Replace, Sequence
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from vzip.errors import CheckpointError


def vicuna_template(system_prompt: str = "", media: collections.abc.Sequence[str] = ("image",)) -> str:
    """The conversation ``v1`` of Vicuna, with which LLaVA and its kin were trained, as a chat template.

    Args:
        system_prompt: what stands before a dialogue that has no system message; empty: nothing.
        media: what a message may show; each goes before its words, on a line of its own.
    """
    default = (
        "{% if messages[0]['role'] != 'system' %}{{ '" + system_prompt.replace("'", "\\'") + " ' }}{% endif %}"
        if system_prompt
        else ""
    )
    shown = "".join(
        "{% for part in message['content'] if part['type'] == '" + kind + "' %}<" + kind + ">\n{% endfor %}"
        for kind in media
    )
    return (
        default + "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %} "
        "{% else %}{{ message['role'].upper() + ': ' }}"
        + shown
        + "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def llama_tokenizer(
    directory: Path, vocab_size: int, placeholders: collections.abc.Sequence[str], pad_token: str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a language model, as LLaVA's code tokenizes around its placeholders.

    Args:
        directory: with ``tokenizer.model``.
        vocab_size: words of the language model, as ``config.json`` has it.
        placeholders: words that are added; they get the ids after the others.
        pad_token: None: the tokenizer's own; else added last.

    Raises:
        CheckpointError: there is none, or it has another number of words.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise CheckpointError(f"{directory}: holds no tokenizer.model; copy it from the language model.")
    # legacy: each text between two placeholders begins with a blank, as where the authors tokenize them one by one. The
    # general class around it, since LlamaTokenizer forgets that setting when it is saved.
    llama = LlamaTokenizer.from_pretrained(directory, legacy=True, trust_remote_code=False)
    if len(llama) != vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {len(llama)} words, but config.json says vocab_size={vocab_size}; they"
            " must be equal. One of them is of another checkpoint."
        )
    backend = llama.backend_tokenizer
    backend.normalizer = Sequence([Prepend("\u2581"), Replace(" ", "\u2581")])  # a blank more where it begins with one
    backend.pre_tokenizer = None
    llama.add_tokens([*placeholders, *([pad_token] if pad_token else [])], special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=llama.bos_token,
        eos_token=llama.eos_token,
        unk_token=llama.unk_token,
        pad_token=pad_token or llama.pad_token,
        padding_side="left",
        model_max_length=llama.model_max_length,
        extra_special_tokens={f"{name.strip('<>')}_token": name for name in placeholders},
    )
