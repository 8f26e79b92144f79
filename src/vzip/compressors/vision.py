"""What methods read: the shape of an image before anything runs, and what the vision tower's run recorded.

Shapes: N crops, U unit rows (CLS and patches of a CLIP tower, patches of a SigLIP one), P patches, D the tower's width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from vzip.errors import ConfigError, nearest

# What a method may read, by name. A score has one value a unit, higher is more important; the others have a row a unit.
SCORES = ("attention", "received_attention", "undivided_attention", "key_norms")
OF_PATCHES = (*SCORES, "present")  # a value for each patch, none for CLS
SIGNALS = (*OF_PATCHES, "keys", "undivided_keys", "hidden", "projected", "text", "aligned")


@dataclass(frozen=True)
class Signal:
    """Something that the vision tower's run records for a method.

    Attributes:
        name: ``attention`` (with CLS: the CLS query's softmax row over the patches, summed over heads; without: the
            mean attention that each patch receives), ``received_attention`` (that mean, whether there is a CLS or not),
            ``undivided_attention`` (as ``attention``, but queries and keys are not divided into heads),
            ``key_norms`` (norm of the unscaled key, mean over heads), ``present`` (1 for patches that the tower ends
            with, 0 for others: of a tower that runs by a ``TowerPlan``), ``keys`` (the unscaled keys, mean over heads),
            ``undivided_keys`` (the unscaled keys of all heads, side by side),
            ``hidden`` (the tower's rows), ``projected`` (the projector's output for the tower's rows), ``text`` (of
            the question, not of units: rows of what ``Compressor.text`` makes of it, ``[N, M, width]``, a shorter
            question's filled up with rows of zeros) or ``aligned`` (the tower's rows in the space that CLIP's image
            and text models share, by ``Compressor.text_encoder``). A method that reads ``text`` is text-aware.
        layer: where it is read, an index into the tower's hidden states (-2: the second-last layer); None: the select
            layer, whose output the model uses.

    Raises:
        ConfigError: an unknown name, a layer that is no whole number, or a layer for ``projected``, which has none.
    """

    name: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SIGNALS:
            raise ConfigError(
                f"signal {self.name!r}: must be one of {', '.join(SIGNALS)}{nearest(str(self.name), SIGNALS)}."
            )
        if self.layer is not None and (isinstance(self.layer, bool) or not isinstance(self.layer, int)):
            raise ConfigError(
                f"layer {self.layer!r} of signal {self.name}: must be a whole number, the index of a layer as in the"
                " tower's hidden states (-2: the second-last layer), or null for the select layer."
            )
        if self.name == "projected" and self.layer is not None:
            raise ConfigError(f"layer {self.layer} of signal projected: the projector reads the select layer alone.")
        if self.name == "text" and self.layer is not None:
            raise ConfigError(f"layer {self.layer} of signal text: the question is no layer of the vision tower.")


def of_tower(signals: Iterable[Signal]) -> frozenset[Signal]:
    """What a usual run of the vision tower must record for these signals; the rest is made of its output, of the
    question, or of a run by a ``TowerPlan``."""
    rows = {Signal("hidden", signal.layer) for signal in signals if signal.name == "aligned"}
    recorded = {signal for signal in signals if signal.name not in ("projected", "text", "aligned", "present")}
    return frozenset(rows | recorded) - {Signal("hidden")}


@dataclass(frozen=True)
class VisionShape:
    """What is known of an image (or a video) before anything is run: all that decides how many tokens it becomes.

    Attributes:
        kind: ``image`` or ``video``.
        num_crops: inputs of the vision tower: a base crop and tiles, or frames.
        grid: (rows, cols) of the patches of a crop.
        has_cls: whether the first unit of a crop is a CLS token.
        num_vanilla: visual tokens of the unmodified model for the whole of it.
        num_added: tokens that the family adds to the compressed ones (newlines), for the whole of it.
        num_placeholders: placeholders that the processor of the checkpoint writes for it; None: ``num_vanilla``.
        fixed: whether all crops have this grid. Otherwise a budget above what a small one has keeps all of it.
    """

    kind: Literal["image", "video"]
    num_crops: int
    grid: tuple[int, int]
    has_cls: bool
    num_vanilla: int
    num_added: int = 0
    num_placeholders: int | None = None
    fixed: bool = True

    @property
    def joined(self) -> VisionShape:
        """The same with all its crops as one: its units are the unmodified model's visual tokens in their order."""
        return replace(self, num_crops=1, grid=(1, self.num_vanilla), has_cls=False, num_added=0)

    @property
    def num_patches(self) -> int:
        """P, of a crop."""
        return self.grid[0] * self.grid[1]

    @property
    def num_units(self) -> int:
        """U, of a crop."""
        return self.num_patches + int(self.has_cls)


@dataclass(frozen=True)
class VisionOutput:
    """What the vision tower produced for N crops, at the select layer; methods ask ``read``.

    Attributes:
        hidden: ``[N, U, D]``, all rows of the tower, CLS first where there is one.
        has_cls: whether row 0 is a CLS token.
        grid: (rows, cols) of the patches; rows * cols = P = U - has_cls.
        attention: ``[N, P]`` float32 or float64, the signal of that name at the select layer, or None if not recorded.
        keys: ``[N, U, d]``, likewise.
        stock_offset: first row the unmodified model passes to its projector (1: row 0 is dropped; 0: all are used).
            None stands for "CLS is dropped". A checkpoint's ``vision_feature_select_strategy`` decides it.
        signals: what else was recorded: scores ``[N, P]``, rows ``[N, U, ...]``.
        valid: bool ``[N, U]``, False for units that show nothing (padding, newlines): kept only where there are not
            enough others. None: all are.
        project: the projector, rows ``[N, U, D]`` -> ``[N, U, E]``; None where there is none, or rows are projected.
        whole: the image's shape where the N are whole images (``Compressor.scope``); None for crops.
        fixed: as ``VisionShape.fixed``.
        num_crops: of each image (or video), whose crops follow one another; None: each crop is an image.
        planes: ``[N, U, F]``, what else of each unit enters the language model, at deeper layers (DeepStack); the
            selection is applied to it too. None: nothing does.
    """

    hidden: Tensor
    has_cls: bool
    grid: tuple[int, int]
    attention: Tensor | None = None
    keys: Tensor | None = None
    stock_offset: int | None = None
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    valid: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    whole: VisionShape | None = None
    fixed: bool = True
    num_crops: Sequence[int] | None = None
    planes: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """U, CLS included."""
        return self.hidden.shape[1]

    @property
    def num_patches(self) -> int:
        """P."""
        return self.hidden.shape[1] - int(self.has_cls)

    @property
    def first_stock_row(self) -> int:
        """First row of ``hidden`` that the unmodified model uses."""
        return int(self.has_cls) if self.stock_offset is None else self.stock_offset

    @property
    def shape(self) -> VisionShape:
        """Of one of the N: of the whole image, or of a crop taken by itself."""
        if self.whole is not None:
            return self.whole
        num_vanilla = self.num_rows - self.first_stock_row
        return VisionShape("image", 1, self.grid, self.has_cls, num_vanilla, fixed=self.fixed)

    def read(self, signal: Signal) -> Tensor:
        """A signal by unit rows: a score ``[N, U]``, anything else ``[N, U, width]``.

        A score's value for CLS, which is scored by nothing, is 0. ``projected`` runs the projector.

        Raises:
            ValueError: it was not recorded.
        """
        if signal == Signal("hidden"):
            return self.hidden
        if signal.name == "projected":
            return self.hidden if self.project is None else self.project(self.hidden)
        value = self._recorded(signal)
        return functional.pad(value, (int(self.has_cls), 0)) if signal.name in OF_PATCHES else value

    def _recorded(self, signal: Signal) -> Tensor:
        """A signal as the tower's run left it: a score ``[N, P]``, anything else by unit rows."""
        recorded = dict(self.signals)
        for name, value in (("attention", self.attention), ("keys", self.keys)):
            if value is not None:
                recorded[Signal(name)] = value
        if signal not in recorded:
            raise ValueError(f"{signal} was not recorded: name it in the compressor's `reads`.")
        return recorded[signal]

    def read_patches(self, signal: Signal) -> Tensor:
        """The same without CLS: ``[N, P]`` or ``[N, P, width]``."""
        if signal.name in OF_PATCHES:
            return self._recorded(signal)
        return self.read(signal)[:, int(self.has_cls) :]

    def over_images(self, values: Tensor, function: Literal["amin", "amax"]) -> Tensor:
        """The least or greatest of ``values [N, P]`` over all crops of an image, for each crop: ``[N, 1]``."""
        of_crops = getattr(values, function)(dim=1)
        if self.num_crops is not None and len(self.num_crops) < len(values):
            images = list(itertools.chain(*([number] * count for number, count in enumerate(self.num_crops))))
            image_of = torch.tensor(images).to(values.device, non_blocking=True)
            of_images = of_crops.new_zeros(len(self.num_crops))
            of_images = of_images.scatter_reduce(0, image_of, of_crops, function, include_self=False)
            of_crops = of_images[image_of]
        return of_crops[:, None]

    @property
    def valid_patches(self) -> Tensor | None:
        """``valid`` without CLS: ``[N, P]``."""
        return None if self.valid is None else self.valid[:, int(self.has_cls) :]
