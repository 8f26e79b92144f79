"""The options of a family, and whether a compressor fits them: known before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from vzip.compressors.base import SCORES, Compressor
from vzip.compressors.controls import Identity
from vzip.errors import ConfigError

from ..towers.structure import TowerGeometry


@dataclass(frozen=True)
class FamilyOptions:
    """What some families can do beyond what the published code does.

    Attributes:
        drop_padding: (LLaVA-NeXT) patches that show nothing but the padding around the picture are not selected as long
            as their tile has enough others (they are still merged). Needs a compressor that selects by attention.
        row_newline: (LLaVA-NeXT) the model's newline token after each row of patches of the tile grid, as without
            compression; these tokens come on top of the budget. With ``drop_padding``, rows that are only padding get
            none.
        drop_cls: (Mini-Gemini) compression chooses among the mined patches alone. False: CLS, which owns no window and
            stays unmined, is the first dominant token, as for LLaVA-1.5. The uncompressed model never uses it.
    """

    drop_padding: bool = False
    row_newline: bool = False
    drop_cls: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool):
                raise ConfigError(f"model.{name}={value!r}: must be true or false.")


def check_fit(compressor: Compressor, geometry: TowerGeometry, options: FamilyOptions) -> None:
    """Raises ConfigError if the compressor does not fit the vision tower or the family's options."""
    compressor.check_fits(geometry.num_patches, geometry.has_cls and not options.drop_cls)
    check_score_layer(compressor.score_layer, geometry.num_layers)
    check_drop_padding(compressor, options.drop_padding)


def check_score_layer(score_layer: int | None, num_layers: int) -> None:
    """Raises ConfigError if the tower has no such layer, or no attention at it."""
    if score_layer is None or 1 <= score_layer <= num_layers or -num_layers <= score_layer <= -1:
        return
    raise ConfigError(
        f"compressor.score_layer={score_layer}: the vision tower has {num_layers} layers, so 1 to {num_layers} or"
        f" {-num_layers} to -1 (the last) are allowed, or null for the layer whose output the model uses."
    )


def check_drop_padding(compressor: Compressor, drop_padding: bool) -> None:
    """Raises ConfigError if padding cannot be kept from being selected because attention does not decide."""
    if drop_padding and compressor.requires.isdisjoint(SCORES) and not isinstance(compressor, Identity):
        raise ConfigError(
            "model.drop_padding=True keeps padding from being selected by attention, and"
            f" {type(compressor).__name__} does not select by attention: set drop_padding=False, or use VisionZip or"
            " DominantOnly."
        )
