"""VScan, stage 1: patches by global and by windowed shallow attention, the rest merged into them (arXiv 2505.22654)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vzip.errors import ConfigError
from vzip.ops.attention import at_least_float32
from vzip.ops.merge import MergeRule
from vzip.ops.select import gather_rows, top_indices

from .base import Budgeted, Selection
from .vision import Signal, VisionOutput


@dataclass(frozen=True)
class VScan(Budgeted):
    """Keeps ``budget.num_tokens`` patches and averages each other patch into its most similar kept one.

    Half of the budget goes to windows of the grid, to each alike, by the attention of a shallow layer; what is left of
    it to the patches of highest attention of the select layer among the others. Similarity is the cosine of projected
    rows. Where the grid is no multiple of the window, the last windows are larger. CLS is dropped.

    Attributes:
        budget: tokens per crop.
        local_layer: the layer of the windows' attention (6: the sixth layer's output), see ``Signal.layer``.
        window: side of a window in patches.

    Raises:
        ConfigError: a layer or a window that is no whole number, or a window below 1.
    """

    space: ClassVar[Literal["tower", "projected"]] = "projected"
    uses_valid: ClassVar[bool] = True
    uses_grid: ClassVar[bool] = True
    merge_rule: ClassVar[MergeRule] = "mean"  # type: ignore[misc]  # fixed here, an option elsewhere

    local_layer: int = 6
    window: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        Signal("attention", self.local_layer)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ConfigError(f"compressor.window={self.window!r}: must be a whole number of patches, 1 or more.")

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention"), Signal("attention", self.local_layer)})

    def select(self, vision: VisionOutput) -> Selection:
        num_tokens, valid = self.num_tokens(vision.shape), vision.valid_patches
        local = self._best_of_windows(
            vision.read_patches(Signal("attention", self.local_layer)), vision.grid, num_tokens
        )
        attention = at_least_float32(vision.read_patches(Signal("attention")))
        if valid is not None:
            attention = attention.masked_fill(~valid, -1.0)  # below any attention
        kept = top_indices(attention.masked_fill(local, torch.inf), num_tokens)
        rows = functional.normalize(
            at_least_float32(vision.read(Signal("projected"))[:, int(vision.has_cls) :]), dim=-1
        )
        nearest = (rows @ gather_rows(rows, kept).transpose(1, 2)).argmax(dim=-1)
        merge_index = functional.pad(nearest.scatter(1, kept, -1), (int(vision.has_cls), 0), value=-1)
        return Selection(kept + int(vision.has_cls), merge_index)

    def _best_of_windows(self, score: Tensor, grid: tuple[int, int], num_tokens: int) -> Tensor:
        """Bool ``[N, P]``: the patches of highest ``score [N, P]`` of each window, half of ``num_tokens`` over all."""
        rows, cols = (max(side // self.window, 1) for side in grid)
        row = (torch.arange(grid[0], device=score.device) // self.window).clamp(max=rows - 1)
        col = (torch.arange(grid[1], device=score.device) // self.window).clamp(max=cols - 1)
        window = (row[:, None] * cols + col).flatten()  # [P]
        order = torch.sort(at_least_float32(score), dim=-1, descending=True, stable=True).indices
        by_window = torch.sort(window[order], dim=-1, stable=True)  # one window after the other, the best first in each
        windows = torch.arange(rows * cols, device=score.device).repeat(len(score), 1)
        first = torch.searchsorted(by_window.values, windows)
        rank = torch.arange(score.shape[1], device=score.device) - first.gather(1, by_window.values)
        is_best = rank < num_tokens // 2 // (rows * cols)
        return torch.zeros_like(is_best).scatter(1, order.gather(1, by_window.indices), is_best)
