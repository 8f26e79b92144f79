"""Where visual tokens stand: the places of those that are left, and the position ids that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vzip.compressors.vision import VisionShape


@dataclass(frozen=True)
class VisualTokens:
    """An image (or a video) as it enters the language model.

    Attributes:
        rows: ``[num_visual_tokens, d_text]``.
        place_index: int64 ``[num_visual_tokens]``, the one of the unmodified model's visual tokens whose place each
            takes, ascending; None where positions are counted anew and all tokens stand in one run.
        planes: ``[num_visual_tokens, F]``, what of each enters at deeper layers (``VisionOutput.planes``), or None.
    """

    rows: Tensor
    place_index: Tensor | None = None
    planes: Tensor | None = None

    def in_order(self) -> VisualTokens:
        """The tokens by their places; of one place in the order they had."""
        assert self.place_index is not None
        order = self.place_index.argsort(stable=True)
        planes = None if self.planes is None else self.planes[order]
        return VisualTokens(self.rows[order], self.place_index[order], planes)


@dataclass(frozen=True)
class EncodedVisuals:
    """Images and videos that are encoded already, whatever prompts will show them.

    Attributes:
        images: of each its shape and its tokens.
        videos: likewise.
    """

    images: Sequence[tuple[VisionShape, VisualTokens]] = ()
    videos: Sequence[tuple[VisionShape, VisualTokens]] = ()

    @property
    def num_bytes(self) -> int:
        """Memory of all their tokens."""
        parts = [part for _, own in (*self.images, *self.videos) for part in (own.rows, own.place_index, own.planes)]
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: text positions start..stop, or an image (``visual``: its number; videos after images).

    ``units``: of a video that is written in several runs, first and stop of its visual tokens, before compression, that
    are here; None: all of them.
    """

    start: int
    stop: int
    visual: int | None = None
    units: tuple[int, int] | None = None


def shown_part(shape: VisionShape, piece: Piece) -> VisionShape:
    """What of an image (or video) a piece shows: of a video in several runs, one crop."""
    if piece.units is None:
        return shape
    return replace(shape, num_crops=1, num_vanilla=piece.units[1] - piece.units[0])


@dataclass(frozen=True)
class Placement:
    """Where the unmodified model would have each token.

    Attributes:
        position_ids: for each prompt its ids there, int64 ``[axes, length]`` on the CPU; empty where they are counted
            anew, and only the runs of videos are told apart.
        lengths: for each image (or video) its visual tokens there.
        place_index: for each, int64 ``[num_visual_tokens]``, the places that are left, ascending; None: in one run.
    """

    position_ids: Sequence[Tensor]
    lengths: Sequence[int]
    place_index: Sequence[Tensor | None]

    def own(self, piece: Piece) -> slice:
        """Which of its image's (or video's) tokens stand in a piece."""
        assert piece.visual is not None
        places = self.place_index[piece.visual]
        if piece.units is None or places is None:
            return slice(None)
        if isinstance(places, FakeTensor):  # a shape without contents: as if all runs had as many
            first, stop = (len(places) * unit // self.lengths[piece.visual] for unit in piece.units)
            return slice(first, stop)
        first, stop = torch.searchsorted(places, torch.tensor(piece.units, device=places.device)).tolist()
        return slice(first, stop)

    def kept(self, row: int, pieces: Sequence[Piece], device: torch.device) -> Tensor:
        """Position ids of a compressed prompt, ``[axes, T]``."""
        parts, start = [torch.arange(0, device=device)], 0
        for piece in pieces:
            if piece.visual is None:
                length = piece.stop - piece.start
                parts.append(torch.arange(start, start + length, device=device))
            else:
                first, stop = piece.units or (0, self.lengths[piece.visual])
                length = stop - first
                places = self.place_index[piece.visual]
                assert places is not None
                parts.append(places[self.own(piece)].to(device) + start - first)
            start += length
        return self.position_ids[row].to(device)[:, torch.cat(parts)]


def placement_of(
    position_ids: Sequence[Tensor], shapes: Sequence[VisionShape], places: Sequence[Tensor | None]
) -> Placement | None:
    """What ``splice`` needs where places are kept, or a video is in several runs; else None.

    Args:
        position_ids: for each prompt, what the family's ``positions`` says; empty where they are counted anew.
        shapes: of all images, then all videos.
        places: of their visual tokens.
    """
    if not position_ids and all(each is None for each in places):
        return None
    return Placement(position_ids, [shape.num_vanilla for shape in shapes], places)
