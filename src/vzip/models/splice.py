"""Putting visual tokens where the placeholders are: embeddings, mask, positions and labels for the language model.

The plan (which positions of which prompt become which image) is made on the host from ``input_ids``, once a batch; the
tensors are then assembled with slices and one concatenation per prompt, so gradients flow into the visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vzip.compressors.vision import VisionShape
from vzip.errors import PromptError

from .families import Adapter, VisualInputs
from .families.places import Piece, Placement, VisualTokens, placement_of, shown_part
from .tokens import check_vocabulary

PaddingSide = Literal["left", "right"]
IGNORED_LABEL = -100  # torch's cross entropy leaves it out


@dataclass(frozen=True)
class PreparedInputs:
    """What the language model gets.

    Attributes:
        inputs_embeds: ``[B, T, d_text]``; zeros where padded.
        attention_mask: int64 ``[B, T]``, 1 on text and visual tokens, 0 on padding.
        position_ids: int64 ``[B, T]`` (of a family with several axes ``[axes, B, T]``), 0, 1, 2, ... over the tokens of
            each prompt, 0 on padding. Where places are kept, those that the unmodified model gives to what is left.
        labels: int64 ``[B, T]`` with -100 on visual tokens and padding, or None.
        num_visual_tokens: visual tokens that entered: for each image in order, then for each video.
        num_images: how many of these are images.
        visual_index: int64 ``[B, T]`` on the CPU: -1 text, -2 padding, else the number of the image (or video) there.
        text_ids: int64, the ids of all text tokens, row by row.
        planes: ``[visual tokens of all prompts, F]`` in the order of ``visual_index``, or None; see
            ``Adapter.language_context``.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    num_visual_tokens: list[int]
    num_images: int
    visual_index: Tensor
    text_ids: Tensor
    planes: Tensor | None = None


@dataclass
class _Kind:
    """Placeholders of one kind while prompts are read.

    Attributes:
        name: as the placeholder is written in prompts.
        token_id: its id.
        lengths: for each image (or video) of the batch, the placeholders the processor would write.
        first: number of the first of them among images and videos.
        used: how many have found their placeholder; more than there are if placeholders are left over.
        per_prompt: placeholders in each prompt.
    """

    name: str
    token_id: int
    lengths: Sequence[int]
    first: int = 0
    used: int = 0
    per_prompt: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SplicePlan:
    """Which stretches of each prompt are text and which are images or videos, and how the result is padded."""

    rows: list[list[Piece]]
    padding_side: PaddingSide

    def segments(self, input_ids: Tensor, shapes: Sequence[VisionShape]) -> Iterator[list[list[int] | VisionShape]]:
        """Each prompt as ids of text and the shapes of its images and videos, padding left out."""
        for ids, pieces in zip(input_ids.tolist(), self.rows, strict=True):
            yield [ids[p.start : p.stop] if p.visual is None else shown_part(shapes[p.visual], p) for p in pieces]

    def num_tokens(self, num_visual_tokens: Sequence[int]) -> list[int]:
        """Of each prompt, given those of each image, then of each video."""

        def length(piece: Piece) -> int:
            if piece.visual is None:
                return piece.stop - piece.start
            # Of a video in several runs all are counted with the first.
            return 0 if piece.units is not None and piece.units[0] else num_visual_tokens[piece.visual]

        return [sum(map(length, pieces)) for pieces in self.rows]

    def check_labels(self, labels: Tensor, input_ids: Tensor, vocab_size: int | None = None) -> None:
        """Holds labels to the text's vocabulary (None: their shape alone); placeholders and padding may have any.

        Raises:
            PromptError: another shape than ``input_ids``; neither words nor -100.
        """
        if labels.shape != input_ids.shape or labels.is_floating_point():
            raise PromptError(
                f"labels is {labels.dtype} of shape {tuple(labels.shape)}: must be integers of the shape of input_ids,"
                f" {tuple(input_ids.shape)}."
            )
        if vocab_size is None:
            return
        for number, (own, pieces) in enumerate(zip(labels.tolist(), self.rows, strict=True)):
            words = {label for p in pieces if p.visual is None for label in own[p.start : p.stop]} - {IGNORED_LABEL}
            outside = [label for label in sorted(words) if not 0 <= label < vocab_size]
            if outside:
                raise PromptError(
                    f"labels of prompt {number} hold {', '.join(map(str, outside[:8]))}: must be words of the model, 0"
                    f" to {vocab_size - 1}, or {IGNORED_LABEL} where nothing is to be learned."
                )


@torch.compiler.disable(reason="vzip: prompts are laid out on the CPU, so fullgraph=True cannot be; leave it out")
def plan_splice(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_token_id: int,
    expanded_lengths: Sequence[int],
    padding_side: PaddingSide | None = None,
    video_token_id: int | None = None,
    video_lengths: Sequence[int] = (),
    vocab_size: int | None = None,
    video_runs: Sequence[int] = (),
) -> SplicePlan:
    """Matches placeholders to images and videos, prompt by prompt.

    A stretch of consecutive placeholders is either the processor's expansion (its length is the sum of the expanded
    lengths of the next images) or one placeholder an image. Positions the mask excludes are padding, whatever their id.

    Args:
        input_ids: integers ``[B, T]``.
        attention_mask: ``[B, T]`` or None for no padding.
        image_token_id: id of the placeholder.
        expanded_lengths: for each image of the batch, in order, the placeholders the processor would write.
        padding_side: side of the result's padding; None: the input's own, left where the input has none.
        video_token_id: id of a video's placeholder; None for a model without videos.
        video_lengths: as ``expanded_lengths``, for each video.
        vocab_size: rows of the text embedding; None: ids are not held against it.
        video_runs: of each video, in how many runs of one length it is written; none given: each in one.

    Raises:
        PromptError: shapes that do not fit, or another number of placeholders than images or videos; names both. Words
            that the text embedding does not have.
    """
    if not isinstance(input_ids, Tensor):
        raise PromptError(
            f"input_ids is a {type(input_ids).__name__}: must be a tensor [prompts, length]. What build_inputs or a"
            " processor returns is handed on as **inputs."
        )
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise PromptError(
            f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}: integers of shape [prompts, length] are"
            " needed."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise PromptError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}: must be"
            " equal."
        )
    ids = input_ids.tolist()
    masks = [[1] * len(row) for row in ids] if attention_mask is None else attention_mask.tolist()
    kinds = [_Kind("image", image_token_id, expanded_lengths)]
    if video_token_id is not None:
        runs = list(video_runs) or [1] * len(video_lengths)
        lengths = [length // num for length, num in zip(video_lengths, runs, strict=True) for _ in range(num)]
        name = "temporal step" if any(num > 1 for num in runs) else "video"
        kinds.append(_Kind(name, video_token_id, lengths, first=len(expanded_lengths)))
    rows = [_plan_row(row_ids, row_mask, kinds) for row_ids, row_mask in zip(ids, masks, strict=True)]
    for kind in kinds:
        _check_all_used(kind)
    if video_runs:
        rows = _in_runs(rows, len(expanded_lengths), video_lengths, video_runs)
    if vocab_size is not None:
        words = ((number, ids[number][p.start : p.stop]) for number, row in enumerate(rows) for p in row)
        texts = ((number, own) for number, own in words if own[0] not in {kind.token_id for kind in kinds})
        for number, own in texts:
            check_vocabulary(own, vocab_size, f"Prompt {number}")
    return SplicePlan(rows, padding_side or _padding_side(masks))


def _check_all_used(kind: _Kind) -> None:
    """Raises PromptError unless each image (or video) has found its placeholder and none is left over."""
    if kind.used == len(kind.lengths):
        return
    lengths = sorted(set(kind.lengths))
    run = f", or a run of {' or '.join(map(str, lengths))}" if lengths else ""
    raise PromptError(
        f"The prompts hold {sum(kind.per_prompt)} <{kind.name}> placeholders ({_per_prompt(kind.per_prompt)}) but"
        f" {len(kind.lengths)} {kind.name}s were given. Each {kind.name} needs one placeholder (id"
        f" {kind.token_id}) in its prompt{run} as the processor writes it."
    )


def _per_prompt(counts: list[int]) -> str:
    shown = ", ".join(f"prompt {row}: {count}" for row, count in enumerate(counts[:8]))
    return shown + (", ..." if len(counts) > 8 else "")


def _plan_row(ids: list[int], mask: list[int], kinds: list[_Kind]) -> list[Piece]:
    """The pieces of one prompt; counts in ``kinds`` what it uses."""
    by_id = {kind.token_id: kind for kind in kinds}
    for kind in kinds:
        kind.per_prompt.append(sum(i == kind.token_id and bool(m) for i, m in zip(ids, mask, strict=True)))
    pieces: list[Piece] = []
    position, end = 0, len(ids)
    while position < end:
        start = position
        if not mask[position]:
            position += 1
            continue
        found = by_id.get(ids[position])
        while position < end and mask[position] and by_id.get(ids[position]) is found:
            position += 1
        if found is None:
            pieces.append(Piece(start, position))
            continue
        count = _images_in_run(position - start, found.lengths, found.used)
        first = found.first + found.used
        pieces += [Piece(start, position, number) for number in range(first, first + count)]
        found.used += count
    return pieces


def _in_runs(
    rows: list[list[Piece]], num_images: int, lengths: Sequence[int], runs: Sequence[int]
) -> list[list[Piece]]:
    """Pieces that number videos, of pieces that number their runs.

    Raises:
        PromptError: a video whose runs stand in several prompts.
    """
    parts = [(video, run) for video, num in enumerate(runs) for run in range(num)]
    prompt_of: dict[int, int] = {}

    def whole(piece: Piece, prompt: int) -> Piece:
        if piece.visual is None or piece.visual < num_images:
            return piece
        video, run = parts[piece.visual - num_images]
        if prompt_of.setdefault(video, prompt) != prompt:
            raise PromptError(
                f"Video {video} begins in prompt {prompt_of[video]} and goes on in prompt {prompt}: each of its"
                f" {runs[video]} temporal steps needs a run of placeholders in one prompt, as the processor writes it."
            )
        length = lengths[video] // runs[video]
        return replace(piece, visual=num_images + video, units=(run * length, (run + 1) * length))

    return [[whole(piece, prompt) for piece in pieces] for prompt, pieces in enumerate(rows)]


def _images_in_run(length: int, expanded_lengths: Sequence[int], next_image: int) -> int:
    """Images that a run of placeholders stands for: those whose expansions it is, else one each."""
    total = 0
    for count, expanded in enumerate(expanded_lengths[next_image:], start=1):
        total += expanded
        if total == length:
            return count
        if total > length:
            break
    return length


def _padding_side(masks: list[list[int]]) -> PaddingSide:
    """Right if some prompt ends in padding and none begins with it; else left, the side generation needs."""
    begins = any(mask and not mask[0] for mask in masks)
    ends = any(mask and not mask[-1] for mask in masks)
    return "right" if ends and not begins else "left"


def splice(
    plan: SplicePlan,
    input_ids: Tensor,
    embed_tokens: nn.Module,
    images: Sequence[Tensor],
    labels: Tensor | None = None,
    videos: Sequence[Tensor] = (),
    placement: Placement | None = None,
    planes: Sequence[Tensor] = (),
) -> PreparedInputs:
    """Builds the language model's inputs from a plan.

    Args:
        plan: from ``plan_splice`` for these ``input_ids`` and as many images and videos.
        input_ids: integers ``[B, T]``.
        embed_tokens: the text embedding, ids -> ``[.., d_text]``.
        images: for each image ``[num_visual_tokens, d_text]``.
        labels: integers ``[B, T]`` or None.
        videos: for each video ``[num_visual_tokens, d_text]``.
        placement: where places are kept, or videos stand in several runs.
        planes: for each image, then each video, ``[num_visual_tokens, F]``, of a family that has them.

    Returns:
        ``PreparedInputs``, as long as its longest prompt.

    Raises:
        PromptError: labels of another shape than ``input_ids``.
    """
    if labels is not None:
        plan.check_labels(labels, input_ids)
    # Placeholders, and what is excluded, need be no words of the embedding's.
    is_text = torch.zeros(input_ids.shape, dtype=torch.bool)
    text_ids = []
    for row, pieces in enumerate(plan.rows):
        for piece in pieces:
            is_text[row, piece.start : piece.stop] = piece.visual is None
            if piece.visual is None:
                text_ids.append(input_ids[row, piece.start : piece.stop])
    text = embed_tokens(input_ids.masked_fill(~is_text.to(input_ids.device), 0))
    visual = [tokens.to(text.device, text.dtype) for tokens in (*images, *videos)]

    def own(piece: Piece, of_visuals: Sequence[Tensor]) -> Tensor:
        assert piece.visual is not None
        rows = of_visuals[piece.visual]
        return rows if placement is None else rows[placement.own(piece)]

    rows = [
        torch.cat(
            [text[row, p.start : p.stop] if p.visual is None else own(p, visual) for p in pieces]
            or [text[row, :0]]  # a prompt that is all padding
        )
        for row, pieces in enumerate(plan.rows)
    ]
    lengths = [row.shape[0] for row in rows]
    longest = max(lengths, default=0)

    def pad(row: Tensor, value: float) -> Tensor:
        """Embeddings ``[T, d_text]``, or whole numbers whose last axis is T."""
        is_rows = row.is_floating_point()
        missing = longest - row.shape[0 if is_rows else -1]
        sides = (missing, 0) if plan.padding_side == "left" else (0, missing)
        return functional.pad(row, (0, 0, *sides) if is_rows else sides, value=value)

    mask = torch.stack([pad(torch.ones(length, dtype=torch.int64), 0) for length in lengths]).to(text.device)
    if placement is None or not placement.position_ids:
        positions = ((mask.cumsum(dim=1) - 1) * mask).clamp(min=0)
    else:
        kept = [placement.kept(row, pieces, text.device) for row, pieces in enumerate(plan.rows)]
        positions = torch.stack([pad(row, 0) for row in kept], dim=1)
        positions = positions[0] if len(positions) == 1 else positions
    sizes = [[p.stop - p.start if p.visual is None else len(own(p, visual)) for p in pieces] for pieces in plan.rows]
    shown = [[-1 if p.visual is None else p.visual for p in pieces] for pieces in plan.rows]
    deeper = [own(p, planes).to(text.device) for row in plan.rows for p in row if planes and p.visual is not None]
    new_labels = None
    if labels is not None:
        labels = labels.to(text.device)
        ignored = [labels.new_full((tokens.shape[0],), IGNORED_LABEL) for tokens in visual]
        label_rows = [
            torch.cat(
                [labels[row, p.start : p.stop] if p.visual is None else own(p, ignored) for p in pieces]
                or [labels[row, :0]]
            )
            for row, pieces in enumerate(plan.rows)
        ]
        new_labels = torch.stack([pad(row, IGNORED_LABEL) for row in label_rows])
    return PreparedInputs(
        inputs_embeds=torch.stack([pad(row, 0.0) for row in rows]),
        attention_mask=mask,
        position_ids=positions,
        labels=new_labels,
        num_visual_tokens=[tokens.shape[0] for tokens in visual],
        num_images=len(images),
        text_ids=torch.cat(text_ids or [input_ids.new_zeros(0)]),
        visual_index=torch.stack(
            [
                pad(torch.tensor(row or [-1]).repeat_interleave(torch.tensor(size or [0])), -2)
                for row, size in zip(shown, sizes, strict=True)
            ]
        ),
        planes=torch.cat(deeper) if deeper else None,
    )


def positions_before(
    adapter: Adapter, plan: SplicePlan, input_ids: Tensor, shapes: Sequence[VisionShape]
) -> list[Tensor]:
    """For each prompt the position ids of the unmodified model, where places are kept; else an empty list.

    Raises:
        PromptError: as ``Adapter.positions``.
    """
    if not adapter.keeps_places:
        return []
    return [adapter.positions(segments) for segments in plan.segments(input_ids, shapes)]


def splice_tokens(
    adapter: Adapter,
    plan: SplicePlan,
    input_ids: Tensor,
    visual: VisualInputs,
    tokens: Sequence[VisualTokens],
    before: Sequence[Tensor],
    labels: Tensor | None = None,
) -> PreparedInputs:
    """``splice`` of what ``Adapter.encode`` made of ``visual``; ``before`` is from ``positions_before``."""
    placement = placement_of(before, visual.shapes, [each.place_index for each in tokens])
    rows = [each.rows for each in tokens]
    images, videos = rows[: len(visual.images)], rows[len(visual.images) :]
    planes = [each.planes for each in tokens if each.planes is not None]
    prepared = splice(plan, input_ids, adapter.embed_tokens, images, labels, videos, placement, planes)
    if not before and adapter.position_axes > 1:
        return replace(prepared, position_ids=prepared.position_ids.expand(adapter.position_axes, -1, -1))
    return prepared


def check_ends_in_text(visual_index: Tensor) -> None:
    """Raises PromptError for a prompt (padded on the left) whose last token is an image's: its place may be gone."""
    if visual_index.numel() and bool((visual_index[:, -1] >= 0).any()):
        raise PromptError(
            "A prompt ends in an image: what is generated continues from the position of the last token, which"
            " compression may have dropped. Let text follow the image, as the chat template does."
        )
