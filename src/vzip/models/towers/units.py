"""From a vision tower's patches to units where several of them become one visual token (InternVL's pixel shuffle).

Before this, neighbours in the selection would be wrong ones: a token is a square of patches. So a method is given the
squares, with scores and keys that are the mean over each one's patches. CLS has given its scores and is gone.
"""

from __future__ import annotations

from torch import Tensor

from vzip.compressors.vision import Signal, VisionOutput
from vzip.ops.grid import in_squares


def as_units(vision: VisionOutput, side: int) -> VisionOutput:
    """The output of the tower by units.

    Args:
        vision: by patches, with CLS first where there is one.
        side: of a unit in patches; 1: nothing changes.

    Returns:
        ``hidden [N, U, side**2 * D]``, a unit's patches line by line side by side, and the signals ``[N, U, ...]``.
    """
    if side == 1:
        return vision
    rows, cols = vision.grid

    def squares(signal: Signal) -> Tensor:
        return in_squares(vision.read_patches(signal), vision.grid, side)

    found = {s: squares(s) for s in vision.signals}
    found |= {
        Signal(name): squares(Signal(name)) for name in ("attention", "keys") if getattr(vision, name) is not None
    }
    units = {s: value.flatten(2) if s.name == "hidden" else value.mean(dim=2) for s, value in found.items()}
    return VisionOutput(
        squares(Signal("hidden")).flatten(2),
        has_cls=False,
        grid=(rows // side, cols // side),
        attention=units.pop(Signal("attention"), None),
        keys=units.pop(Signal("keys"), None),
        stock_offset=0,
        signals=units,
    )
