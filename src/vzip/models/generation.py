"""What a call of the Hugging Face model may be told, how long its prompts may be, and which ids it is shown.

The model gets embeddings. Options that look at the prompt's ids (``repetition_penalty``, ``no_repeat_ngram_size``, a
user's own logits processors ...) are given ids as long as the embeddings, so they do what they do without compression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vzip.errors import ConfigError, PromptError

_OF_TOWER = ("vision_", "image_", "video_", "pixel_", "mm_encoder_", "interpolate_", "batch_num_images")
_SCALED = ("linear", "dynamic", "yarn", "longrope", "llama3")
# Options that would run on the prompt's ids without its images, and the value at which each does nothing.
_UNSERVED = {
    "assistant_model": None,
    "assistant_tokenizer": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "prompt_lookup_num_tokens": None,
    "guidance_scale": 1,
    "negative_prompt_ids": None,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "token_healing": False,
    "prefill_chunk_size": None,
    "custom_generate": None,
}


class PromptTooLongError(PromptError):
    """A prompt that, with its answer, is longer than the language model reads.

    Attributes:
        room: tokens that the answer may have; none or less: the prompt alone is too long.
    """

    def __init__(self, message: str, room: int) -> None:
        super().__init__(message)
        self.room = room


def check_settings(settings: Mapping[str, Any], config: Any, call: str) -> dict[str, Any]:
    """Settings without those of a step that the wrapper owns, which must be what the wrapper does anyway.

    Args:
        settings: keyword arguments of ``forward`` or ``generate``, beside the processor's outputs.
        config: the model's.
        call: for messages.

    Raises:
        PromptError: one that would have another effect; names it.
    """
    owned = [name for name, value in settings.items() if name.startswith(_OF_TOWER) and value is not None]
    wrong = [name for name in owned if not hasattr(config, name) or getattr(config, name) != settings[name]]
    if wrong:
        said = ", ".join(f"{name}={getattr(config, name)}" for name in wrong if hasattr(config, name))
        raise PromptError(
            f"{call}({', '.join(f'{name}={_shown(settings[name])}' for name in wrong)}): how images are encoded is"
            f" the checkpoint's to say, in its config.json{f' ({said})' if said else ''}. Leave the argument out."
        )
    return {name: value for name, value in settings.items() if not name.startswith(_OF_TOWER)}


def refuse_unserved(settings: Mapping[str, Any], of_model: Any) -> None:
    """Raises ConfigError for options of generation that cannot work from compressed images, all at once.

    Args:
        settings: arguments of ``generate``.
        of_model: the model's generation config, which holds where they say nothing.
    """
    given = {name: _value(settings, of_model, name) for name in _UNSERVED}
    given = {name: value for name, value in given.items() if value is not None and value != _UNSERVED[name]}
    if given:
        raise ConfigError(
            f"generate({', '.join(f'{name}={_shown(value)}' for name, value in given.items())}): works on the prompt's"
            " ids alone, without the images that compression has put among them. Leave it out, here and in the"
            " checkpoint's generation_config.json."
        )


def max_positions(config: Any) -> int | None:
    """Tokens that a model's language model reads, scaled rotary positions counted; None: no limit is known.

    Args:
        config: the whole model's configuration.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if limit is None or not rope:
        return limit
    each = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    reached = [
        int((one.get("original_max_position_embeddings") or limit) * one["factor"])
        for one in each
        if one.get("factor") and one.get("rope_type", one.get("type")) in _SCALED
    ]
    return max([limit, *reached])


def check_length(lengths: Sequence[int], config: Any, num_new_tokens: int = 0, dropped_count: bool = False) -> None:
    """Refuses what the language model cannot read.

    Args:
        lengths: of each prompt in tokens, visual ones counted, padding not.
        config: the whole model's configuration.
        num_new_tokens: of the answer, at most.
        dropped_count: whether lengths are of the positions, which tokens that are dropped have had too.

    Raises:
        PromptTooLongError: naming the prompt, its length and the limit.
    """
    limit, longest = max_positions(config), max(lengths, default=0)
    if limit is None or longest + num_new_tokens <= limit:
        return
    answer = f" and its answer up to {num_new_tokens}" if num_new_tokens else ""
    ways, counted = "use a smaller budget, or shorten the prompt", ""
    if dropped_count:
        ways, counted = "shorten the prompt, or use positions=repacked", " (positions=original: dropped tokens count)"
    raise PromptTooLongError(
        f"Prompt {list(lengths).index(longest)} is {longest} tokens long{counted}{answer}, but the language model reads"
        f" {limit} (max_position_embeddings): {'lower max_new_tokens, ' if num_new_tokens else ''}{ways}.",
        limit - longest,
    )


def num_new_tokens(settings: Mapping[str, Any], of_model: Any, length: int) -> int:
    """Tokens that an answer may have, as ``generate`` would take it; one at least.

    Args:
        settings, of_model: as for ``refuse_unserved``.
        length: of the prompt, padding counted.
    """
    new, whole = (_value(settings, of_model, name) for name in ("max_new_tokens", "max_length"))
    if new is None:
        new = 1 if whole is None else int(whole) - length
    return max(1, int(new))


def prompt_ids(visual_index: Tensor, text: Tensor, placeholders: Tensor, vocab_size: int) -> Tensor:
    """Ids as long as the embeddings: a placeholder for each visual token, as the processor would write them.

    Padding, and placeholders outside the vocabulary, become the row's first word: it is there already, so no option
    sees anything new, whatever is in the batch.

    Args:
        visual_index: int64 ``[B, T]`` on the CPU: -1 text, -2 padding, else the number of the image (or video) there.
        text: the ids of all text tokens, row by row.
        placeholders: for each image (and video) the id of its placeholder.
        vocab_size: of the logits.
    """
    ids = torch.full_like(visual_index, -1)
    ids[visual_index == -1] = text
    shown = visual_index >= 0
    ids[shown] = placeholders[visual_index[shown]]
    ids[ids >= vocab_size] = -1
    first = ids.gather(1, (ids >= 0).int().argmax(dim=1, keepdim=True)) if ids.shape[1] else ids
    return torch.where(ids < 0, first.clamp(min=0), ids)


def only_new(output: Any, length: int) -> Any:
    """Hugging Face's result without the prompt's ids."""
    if isinstance(output, Tensor):
        return output[:, length:]
    output.sequences = output.sequences[:, length:]
    return output


class AnswerStreamer:
    """Hands on to a streamer what is new; in place of the prompt, nothing."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        self._streamer.put(value[..., :0] if self._is_prompt else value)
        self._is_prompt = False

    def end(self) -> None:
        self._streamer.end()


def _value(settings: Mapping[str, Any], of_model: Any, name: str) -> Any:
    configs = [settings.get("generation_config"), of_model]
    values = (settings.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | list | tuple) else type(value).__name__
