"""Text to token ids: the one way, for prompts, dialogues and training alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vzip.errors import PromptError


def tokenize(tokenizer: Any, text: str, with_spans: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenizes a text, templated or not.

    A text that writes the first token itself, as many chat templates do, gets no other from the tokenizer; and no
    token that ends a text is put behind it, since it is continued, or has its own.

    Args:
        tokenizer: the checkpoint's.
        text: of a prompt, a dialogue or a conversation.
        with_spans: also say which characters each token covers; needs a fast tokenizer.

    Returns:
        the ids, and for each the (start, stop) of its characters; without ``with_spans`` no spans.
    """
    bos = tokenizer.bos_token
    has_bos = bool(bos) and text.lstrip().startswith(bos)
    encoding = tokenizer(text, add_special_tokens=not has_bos, return_offsets_mapping=with_spans)
    ids = list(encoding["input_ids"])
    spans = list(encoding["offset_mapping"]) if with_spans else []
    around = [] if has_bos else list(tokenizer("")["input_ids"])
    behind = around[int(around[:1] == [tokenizer.bos_token_id]) :]
    if behind and behind[-1] == tokenizer.eos_token_id:
        del ids[-1:], spans[-1:]
    return ids, spans


def check_vocabulary(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raises PromptError for ids that the text embedding does not have; ``name`` says whose they are."""
    outside = sorted({i for i in ids if not 0 <= i < vocab_size})
    if outside:
        raise PromptError(
            f"{name} holds the ids {', '.join(map(str, outside[:8]))}{', ...' if len(outside) > 8 else ''}: the text"
            f" embedding has rows 0 to {vocab_size - 1}. Use the tokenizer of this checkpoint; exclude padding by"
            " attention_mask."
        )
