"""The options of a family, and whether a compressor fits them: known before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vzip.compressors.base import Compressor
from vzip.compressors.vision import Signal
from vzip.errors import ConfigError, nearest
from vzip.keys import number, whole_number

from ..towers.structure import TowerGeometry

Positions = Literal["original", "repacked"]
POSITIONS: tuple[Positions, ...] = ("original", "repacked")


@dataclass(frozen=True)
class FamilyOptions:
    """What families can do beyond what the published code does.

    Attributes:
        drop_padding: (LLaVA-NeXT) patches that show nothing but the padding around the image are not selected as long
            as their tile has enough others (they are still merged). Needs a compressor that selects by a score.
        row_newline: (LLaVA-NeXT) the model's newline token after each row of patches of the tile grid, as without
            compression; these tokens come on top of the budget. With ``drop_padding``, rows that are only padding get
            none.
        drop_cls: (Mini-Gemini) compression chooses among the mined patches alone. False: CLS, which owns no window and
            stays unmined, is the first dominant token, as for LLaVA-1.5. The uncompressed model never uses it.
        positions: ``original``: each visual token has the position id that the unmodified model gives to the unit whose
            place it takes (a contextual token its target's, CLS the image's first, of a crop's patch that the
            unmodified model cuts off the nearest one's), visual tokens stand in this order, and text goes on where it
            would without compression. ``repacked``: 0, 1, 2, ... over what is left. None: the family's own, as its
            published code does: LLaVA's families ``repacked``, Qwen's ``original``.
        fps: (Qwen) frames taken of each second of a video; of one given as images, how many a second they are. None:
            the checkpoint's own, else 2.
        min_frame_pixels, max_frame_pixels: (Qwen) pixels to which the frames of a video are resized at least and at
            most; None: the checkpoint's own.
    """

    drop_padding: bool = False
    row_newline: bool = False
    drop_cls: bool = False
    positions: Positions | None = None
    fps: float | None = None
    min_frame_pixels: int | None = None
    max_frame_pixels: int | None = None

    def __post_init__(self) -> None:
        for name in ("drop_padding", "row_newline", "drop_cls"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"model.{name}={getattr(self, name)!r}: must be true or false.")
        if self.positions not in (None, *POSITIONS):
            raise ConfigError(
                f"model.positions={self.positions!r}: must be one of {', '.join(POSITIONS)}, or null for the family's"
                f" own{nearest(str(self.positions), POSITIONS)}."
            )
        if self.fps is not None and not (number(0).allows(self.fps) and self.fps):
            raise ConfigError(f"model.fps={self.fps!r}: must be a number of frames a second, above 0.")
        least, most = self.min_frame_pixels, self.max_frame_pixels
        for name, value in (("min_frame_pixels", least), ("max_frame_pixels", most)):
            if value is not None and not whole_number(1).allows(value):
                raise ConfigError(f"model.{name}={value!r}: must be a whole number of pixels, 1 or more.")
        if least is not None and most is not None and least > most:
            raise ConfigError(
                f"model.min_frame_pixels={least} with model.max_frame_pixels={most}: the first must not be above the"
                " second."
            )

    @property
    def of_videos(self) -> dict[str, float | None]:
        """Those that say how videos of files are read, where they are set."""
        names = ("fps", "min_frame_pixels", "max_frame_pixels")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def check_fit(compressor: Compressor, geometry: TowerGeometry, options: FamilyOptions) -> None:
    """Raises ConfigError if the compressor does not fit the vision tower or the family's options."""
    if not compressor.joins_frames:  # of a video a budget may be above what a frame has
        compressor.num_tokens(geometry.shape(options.drop_cls))
    check_tower_use(compressor, geometry)
    for signal in compressor.reads():
        keys = [name for name, value in vars(compressor).items() if value == signal.layer and name.endswith("layer")]
        check_layer(signal, geometry.num_layers, keys[0] if keys else "the method's own layer")
    check_drop_padding(compressor, options.drop_padding)


def check_tower_use(compressor: Compressor, geometry: TowerGeometry) -> None:
    """Raises ConfigError if the tower cannot run as the compressor needs it."""
    if compressor.tower_use == "whole":
        return
    name = type(compressor).__name__
    if compressor.tower_use == "pruned" and not geometry.has_cls:
        raise ConfigError(
            f"compressor={name} drops patches inside the vision tower by what its CLS token attends to, and this tower"
            " (SigLIP) has none. Use another compressor, or a model with a CLIP tower."
        )
    if others := sorted(signal.name for signal in compressor.reads() - {Signal("present")}):
        raise ConfigError(
            f"compressor={name} reads {', '.join(others)} of a vision tower that does not run on all patches, where"
            " there is nothing to read but which are left. Choose a method inside it that leaves the tower whole."
        )


def check_layer(signal: Signal, num_layers: int, key: str) -> None:
    """Raises ConfigError if the tower has no such layer, or no attention at it."""
    layer, lowest = signal.layer, 0 if signal.name == "hidden" else 1
    if layer is None or lowest <= layer <= num_layers or -num_layers <= layer <= -1:
        return
    raise ConfigError(
        f"compressor.{key}={layer}, where the signal {signal.name} is read: the vision tower has {num_layers} layers,"
        f" so {lowest} to {num_layers} or {-num_layers} to -1 (the last) are allowed, or"
        " null for the layer whose output the model uses."
    )


def check_drop_padding(compressor: Compressor, drop_padding: bool) -> None:
    """Raises ConfigError if the compressor would keep padding like anything else."""
    if drop_padding and not (compressor.uses_valid or compressor.is_vanilla):
        raise ConfigError(
            "model.drop_padding=True keeps padding from being selected by attention, and"
            f" {type(compressor).__name__} does not select by attention or another score: set drop_padding=False, or"
            " use a method that does, such as VisionZip or DominantOnly."
        )
