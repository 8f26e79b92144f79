"""Which patches of an image a compressor keeps, and which it merges into which, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.base import CompressedTokens, Compressor, Selection
from vzip.compressors.vision import VisionOutput, VisionShape
from vzip.compressors.wrappers import Wrapper
from vzip.models.families.base import VisualInputs
from vzip.models.vlm import CompressedVlm

from .kept import as_image


@dataclass(frozen=True)
class Watched(Wrapper):
    """A compressor that remembers what it kept; everything else is that of the one inside.

    Attributes:
        kept: of each call what it was given, and what it returned.
    """

    kept: list[tuple[VisionOutput, CompressedTokens]] = field(default_factory=list)

    def select(self, vision: VisionOutput) -> Selection:
        return self.of.select(vision)

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        result = self.of.compress(vision)
        self.kept.append((vision, result))
        return result


@dataclass(frozen=True)
class KeptMap:
    """What became of the patches of the crop that shows a whole image.

    Attributes:
        seen: that crop, as the vision tower saw it.
        grid: (rows, cols) of its patches, which are numbered row by row.
        kept: patches that are tokens of their own, ascending.
        groups: of each token that others were merged into, the patch whose place it takes (None: it has none in this
            crop) and the patches of this crop merged into it, the first among them where it is not kept by itself.
    """

    seen: Image.Image
    grid: tuple[int, int]
    kept: list[int]
    groups: list[tuple[int | None, list[int]]]


@torch.inference_mode()
def kept_patches(
    vlm: CompressedVlm, image: Image.Image, compressor: Compressor, question: str | None = None
) -> tuple[set[int], int]:
    """The patches that a method keeps of an image, numbered crop by crop, and how many the image has.

    Kept are those that are tokens of their own: not CLS, newlines, and contextual tokens. Only a text-aware method
    looks at the question.

    Raises:
        ConfigError: the wrapper has no processor.
        PromptError: a text-aware method without a question.
        ImageError: an image that cannot be used.
    """
    visual, kept, _ = _patches(vlm, image, compressor, question)
    (shape,) = visual.images
    return set(kept), shape.num_crops * shape.num_patches


@torch.inference_mode()
def kept_map(vlm: CompressedVlm, image: Image.Image, compressor: Compressor, question: str | None = None) -> KeptMap:
    """What a method keeps and merges of an image, in the crop that shows the whole of it; as ``kept_patches``."""
    visual, kept, merged = _patches(vlm, image, compressor, question)
    (shape,) = visual.images
    adapter, num_patches = vlm.adapter, shape.num_patches
    first = adapter.overview_index(shape) * num_patches

    def here(patches: list[int]) -> list[int]:
        return sorted(patch - first for patch in patches if first <= patch < first + num_patches)

    groups = []
    for target, members in merged:
        own = here([] if target is None else [target])
        if inside := here(members):
            groups.append((own[0] if own else None, inside))
    seen = as_image(adapter.shown(adapter.viewed(visual, compressor)), vlm)
    return KeptMap(seen, shape.grid, here(kept), groups)


def _patches(
    vlm: CompressedVlm, image: Image.Image, compressor: Compressor, question: str | None
) -> tuple[VisualInputs, list[int], list[tuple[int | None, list[int]]]]:
    """What entered the tower; patches kept; and each token that others join: its patch, and theirs.

    Patches are numbered crop by crop.
    """
    adapter, watched = vlm.adapter, Watched(compressor)
    inputs = {name: value.to(vlm.device) for name, value in vlm.preprocess_images([image]).items()}
    visual = adapter.read_inputs(**inputs)
    visual = adapter.asked(visual, compressor, None if question is None else [question], vlm.processor)
    (shape,) = visual.images
    adapter.encode(visual, watched)
    kept: list[int] = []
    groups: list[tuple[int | None, list[int]]] = []
    for vision, tokens in watched.kept:
        for crop in range(tokens.source_index.shape[0]):
            if compressor.scope == "image":
                patch_of = _of_whole(adapter.whole_index(shape), vision.num_rows, shape)
            else:
                start = crop * shape.num_patches - vision.has_cls
                patch_of = [start + unit if unit >= vision.has_cls else None for unit in range(vision.num_rows)]
            kept += [patch for unit in tokens.source_index[crop].tolist() if (patch := patch_of[unit]) is not None]
            groups += _groups(tokens, crop, patch_of)
    return visual, kept, groups


def _groups(tokens: CompressedTokens, crop: int, patch_of: list[int | None]) -> list[tuple[int | None, list[int]]]:
    members: dict[int, list[int]] = {}
    for unit, slot in enumerate(tokens.merge_index[crop].tolist()):
        if slot >= 0 and (patch := patch_of[unit]) is not None:
            members.setdefault(slot, []).append(patch)
    num_kept = tokens.source_index.shape[1]
    # A slot counts contextual tokens where there are any, else the kept ones.
    first = num_kept if tokens.num_tokens > num_kept else 0
    places = (tokens.source_index if tokens.place_index is None else tokens.place_index)[crop].tolist()
    of_slot = {slot: places[first + slot] for slot in members if first + slot < len(places)}
    return [(patch_of[of_slot[slot]] if slot in of_slot else None, members[slot]) for slot in sorted(members)]


def _of_whole(packing: Tensor | None, num_rows: int, shape: VisionShape) -> list[int | None]:
    """Of each unit of a packed image its patch, numbered crop by crop; None for CLS tokens and newlines."""
    rows = list(range(num_rows)) if packing is None else packing.tolist()
    num_all = num_rows if packing is None else int(packing.max()) + 1
    has_cls = max(0, num_all // shape.num_crops - shape.num_patches)  # where the unmodified model passes it on
    width = shape.num_patches + has_cls
    return [
        row // width * shape.num_patches + row % width - has_cls if row % width >= has_cls <= row else None
        for row in rows
    ]
