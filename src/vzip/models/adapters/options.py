"""The options of a family, and whether a compressor fits them: known before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from vzip.compressors.base import Compressor
from vzip.compressors.controls import Identity
from vzip.errors import ConfigError

from ..towers import TowerGeometry


@dataclass(frozen=True)
class PackingOptions:
    """How tiles become one sequence, beyond what the published code does; for families that cut pictures into tiles.

    Attributes:
        drop_padding: patches that show nothing but the padding around the picture are not selected as long as their
            tile has enough others (they are still merged). Needs a compressor that selects by attention.
        row_newline: the model's newline token after each row of patches of the tile grid, as without compression;
            these tokens come on top of the budget. With ``drop_padding``, rows that are only padding get none.
    """

    drop_padding: bool = False
    row_newline: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool):
                raise ConfigError(f"model.{name}={value!r}: must be true or false.")


def check_fit(compressor: Compressor, geometry: TowerGeometry, packing: PackingOptions) -> None:
    """Raises ConfigError if the compressor does not fit the vision tower or the packing's options."""
    compressor.check_fits(geometry.num_patches, geometry.has_cls)
    check_drop_padding(compressor, packing.drop_padding)


def check_drop_padding(compressor: Compressor, drop_padding: bool) -> None:
    """Raises ConfigError if padding cannot be kept from being selected because attention does not decide."""
    if drop_padding and "attention" not in compressor.requires and not isinstance(compressor, Identity):
        raise ConfigError(
            "model.drop_padding=True keeps padding from being selected by attention, and"
            f" {type(compressor).__name__} does not select by attention: set drop_padding=False, or use VisionZip or"
            " DominantOnly."
        )
