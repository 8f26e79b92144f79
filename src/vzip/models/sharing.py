"""Prompts about the same images in one row: each sees what they have in common, and itself, and no other.

Visual tokens are most of a prompt, so asking many questions about an image at once costs little more than asking one.
What is shared ends with the last visual token, and the positions of each question go on from there, so to the language
model every question stands where it stands in a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vzip.errors import ConfigError, UnsupportedModelError

from .splice import IGNORED_LABEL, PreparedInputs

TAKEN = ("sdpa", "eager")  # attention implementations that take any mask


def check_attention(implementation: str | None) -> None:
    """Raises ConfigError for an attention that knows no other mask than that of a prompt by itself."""
    if implementation not in TAKEN:
        raise ConfigError(
            f"train.share_images=true with model.attn_implementation={implementation}: questions that share an image"
            f" need a mask of their own, which {' and '.join(TAKEN)} take alone. Use one of these, or"
            " train.share_images=false."
        )


def check_shares(config: Any) -> str:
    """The attention implementation of a language model whose prompts can share a row.

    Args:
        config: the language model's (``get_text_config()``).

    Raises:
        ConfigError: as ``check_attention``.
        UnsupportedModelError: layers that see a sliding window only.
    """
    implementation = getattr(config, "_attn_implementation", None)
    check_attention(implementation)
    window = getattr(config, "sliding_window", None)
    # Qwen's configurations name a window that `use_sliding_window` turns on; what their layers do is in layer_types.
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and windowed and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"train.share_images=true: the language model's layers see a sliding window (sliding_window={window} in the"
            " text_config of its config.json), which would be counted over other questions too. Set"
            " train.share_images=false."
        )
    return str(implementation)


@dataclass(frozen=True)
class SharedInputs:
    """What the language model gets: R rows of up to T tokens, padded on the right.

    Attributes:
        inputs_embeds: ``[R, T, d_text]``; zeros where padded.
        attention_mask: ``[R, 1, T, T]``, which key (last) each query may see; bool, or as added to scores.
        position_ids: int64 ``[R, T]`` (of a family with several axes ``[axes, R, T]``), each token's in its own prompt.
        labels: int64 ``[R, T]``; of what is shared -100.
        visual_index, planes: as those of ``PreparedInputs``, what is shared once a row.
        prompt_of: int64 ``[R, T]`` on the CPU: the prompt that each token belongs to, of what is shared the row's
            first; -1 on padding.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    visual_index: Tensor
    planes: Tensor | None
    prompt_of: Tensor


def share_rows(prepared: PreparedInputs, rows: Sequence[Sequence[int]], implementation: str = "sdpa") -> SharedInputs:
    """Puts prompts that begin alike into one row.

    Gradients of what is shared are the sums over the prompts, as with a row each.

    Args:
        prepared: S prompts with labels, padded on either side.
        rows: the prompts of each row. Those of one row are equal up to their last visual token, and learn nothing up to
            the token after it.
        implementation: of attention; ``eager`` adds its mask to the scores, ``sdpa`` takes either and is given bool.
    """
    assert prepared.labels is not None
    length = prepared.visual_index.shape[1]
    indices, blocks = [], []
    for prompts in rows:
        index: list[Tensor] = []
        block: list[Tensor] = []
        for number, prompt in enumerate(prompts):
            places = (prepared.visual_index[prompt] != -2).nonzero().squeeze(1)
            visual = (prepared.visual_index[prompt, places] >= 0).nonzero()
            end = int(visual[-1]) + 1 if len(visual) else 0
            start = end if number else 0  # what is shared is taken from the first
            index.append(prompt * length + places[start:])
            block.append(torch.where(torch.arange(start, len(places)) < end, 0, number + 1))
        indices.append(torch.cat(index))
        blocks.append(torch.cat(block))
    taken, seen = (pad_sequence(own, batch_first=True, padding_value=-1) for own in (indices, blocks))
    return _gathered(prepared, taken, seen, implementation)


def _gathered(prepared: PreparedInputs, index: Tensor, block: Tensor, implementation: str) -> SharedInputs:
    """Rows of the tokens at ``index [R, T]`` of the flattened prompts (-1: padding), in the blocks ``[R, T]``."""
    embeds, labels = prepared.inputs_embeds, prepared.labels
    assert labels is not None
    device, length = embeds.device, prepared.visual_index.shape[1]
    is_padding = index < 0
    taken, padding = index.clamp(min=0).to(device), is_padding.to(device)
    visual_index = prepared.visual_index.flatten()[index.clamp(min=0)].masked_fill(is_padding, -2)
    planes = prepared.planes
    if planes is not None:
        number = (prepared.visual_index.flatten() >= 0).cumsum(0) - 1
        planes = planes[number[index[visual_index >= 0]].to(planes.device)]
    block = block.to(device)
    visible = (block[:, :, None] == block[:, None]) | (block[:, None] == 0)
    visible = (visible & torch.ones(visible.shape[1:], dtype=torch.bool, device=device).tril())[:, None]
    if implementation == "eager":
        lowest = torch.finfo(embeds.dtype).min
        visible = torch.zeros(visible.shape, dtype=embeds.dtype, device=device).masked_fill(~visible, lowest)
    rows = embeds.flatten(0, 1).index_select(0, taken.flatten()).unflatten(0, taken.shape)
    return SharedInputs(
        inputs_embeds=rows.masked_fill(padding[..., None], 0.0),
        attention_mask=visible,
        position_ids=prepared.position_ids.flatten(-2)[..., taken].masked_fill(padding, 0),
        labels=labels.flatten()[taken].masked_fill(padding, IGNORED_LABEL),
        visual_index=visual_index,
        planes=planes,
        prompt_of=torch.where(is_padding, -1, index.div(length, rounding_mode="floor")),
    )
