"""A grid of patches cut into a smaller grid of cells."""

from __future__ import annotations

import torch
from torch import Tensor


def cells(side: int, num_cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A side cut into cells: int64 ``[side]``, the cell of each place, and ``[num_cells]``, the place in its middle."""
    starts = (torch.arange(num_cells + 1, device=device) * side + num_cells - 1) // num_cells
    return torch.arange(side, device=device) * num_cells // side, (starts[:-1] + starts[1:] - 1) // 2


def middle_places(grid: tuple[int, int], smaller: tuple[int, int], device: torch.device) -> Tensor:
    """For each cell of a smaller grid the place of ``grid`` in its middle, in raster order: int64 ``[rows * cols]``."""
    (_, rows), (_, cols) = (cells(side, count, device) for side, count in zip(grid, smaller, strict=True))
    return (rows[:, None] * grid[1] + cols).flatten()


def in_squares(rows: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Patches by the square that they lie in: ``[N, P, ...]`` -> ``[N, P / side**2, side**2, ...]``.

    Squares follow one another line by line, and so do patches within each.

    Args:
        rows: of the patches, line by line.
        grid: (rows, cols) of patches, multiples of ``side``.
        side: of a square in patches.
    """
    lines, columns = (length // side for length in grid)
    squares = rows.unflatten(1, (lines, side, columns, side)).transpose(2, 3)
    return squares.flatten(3, 4).flatten(1, 2)
