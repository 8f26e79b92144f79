"""How a method has the vision tower run: on a smaller image, or with patches dropped between its layers.

Shapes: N crops, L rows (CLS and patches), P patches, H heads, d = head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# As a rule; with patches dropped between its layers; on a smaller image.
TowerUse = Literal["whole", "pruned", "resized"]


@dataclass(frozen=True)
class LayerState:
    """A layer of a vision tower with CLS, as a ``TowerPruner`` sees it; crops may have different numbers of patches.

    Attributes:
        index: of the layer, from 0.
        num_layers: layers that run.
        queries, keys, values: ``[N, L, H * d]``, the layer's projections, CLS first.
        num_heads: H.
        scale: factor on the products of queries and keys.
        num_patches: int64 ``[N]``.
        shown: bool ``[N, L]``, False where a crop has no more patches; None: all have P.
        carried: ``[N, P]``, the scores of the layer before of these patches; None in the first layer.
    """

    index: int
    num_layers: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    num_heads: int
    scale: float
    num_patches: Tensor
    shown: Tensor | None
    carried: Tensor | None


class TowerPruner(ABC):
    """Drops patches between the layers of the vision tower, of each crop by itself, until ``num_tokens`` are left.

    Attributes:
        num_tokens: patches that the last cut leaves.
    """

    num_tokens: int

    @abstractmethod
    def cuts(self, num_layers: int) -> Sequence[int]:
        """Layers, from 0, after which patches are dropped, ascending; at least one. ``num_layers`` run."""

    @abstractmethod
    def judge(self, state: LayerState) -> tuple[Tensor, Tensor]:
        """Scores ``[N, P]``, of which the highest stay, and how many patches go if there is a cut: int64 ``[N]``.

        Called for every layer while there are more than ``num_tokens`` patches. At the last cut all others go.
        """


@dataclass(frozen=True)
class TowerPlan:
    """What differs from a usual run of the vision tower.

    Attributes:
        grid: (rows, cols) of patches to which the image is resized; None: it is not.
        pruner: what drops patches between layers, if anything does.
    """

    grid: tuple[int, int] | None = None
    pruner: TowerPruner | None = None
