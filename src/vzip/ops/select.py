"""Choosing rows: top scores with a fixed tie rule, and the rows left over. No host synchronisation, no loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .attention import at_least_float32


def top_indices(scores: Tensor, num_selected: int, valid: Tensor | None = None) -> Tensor:
    """Indices of the highest scores, in ascending index order; of equal scores the lower index wins.

    ``torch.topk`` leaves ties open and breaks them differently on CPU and GPU; a stable descending sort does not.

    Args:
        scores: ``[N, P]``, any floating type.
        num_selected: 0 <= num_selected <= P.
        valid: bool ``[N, P]``; those that are not come after all that are, in index order. None: all are.

    Returns:
        int64 ``[N, num_selected]``.
    """
    scores = at_least_float32(scores)
    if valid is not None:
        scores = scores.masked_fill(~valid, -math.inf)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :num_selected].sort(dim=-1).values


def dominant_rows(attention: Tensor, num_dominant: int, has_cls: bool, valid: Tensor | None = None) -> Tensor:
    """Rows of the tower's output kept as dominant tokens, ascending.

    With CLS: row 0 and the ``num_dominant - 1`` patches of highest attention (patch p is row p + 1). Without: the
    ``num_dominant`` patches of highest attention.

    Args:
        attention: ``[N, P]``.
        num_dominant: at least 1 where there is a CLS.
        has_cls: whether row 0 of the tower's output is CLS.
        valid: bool ``[N, P]``, as for ``top_indices``.

    Returns:
        int64 ``[N, num_dominant]``.
    """
    if not has_cls:
        return top_indices(attention, num_dominant, valid)
    patches = top_indices(attention, num_dominant - 1, valid) + 1
    return torch.cat([patches.new_zeros(patches.shape[0], 1), patches], dim=1)


def kept_and_rest(scores: Tensor, num_selected: int) -> Tensor:
    """All indices: those of ``top_indices``, then all others, both ascending.

    Args:
        scores: ``[N, P]``, float32 or float64.
        num_selected: 0 <= num_selected <= P.

    Returns:
        int64 ``[N, P]``.
    """
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :num_selected]
    is_kept = torch.zeros_like(scores, dtype=torch.uint8).scatter(1, best, 1)
    return torch.sort(is_kept, dim=1, descending=True, stable=True).indices


def remaining_rows(kept: Tensor, num_rows: int) -> Tensor:
    """Rows not in ``kept``, ascending.

    Args:
        kept: int64 ``[N, K]``, distinct within a row.
        num_rows: L, the number of rows in all.

    Returns:
        int64 ``[N, L - K]``.
    """
    is_kept = torch.zeros(kept.shape[0], num_rows, dtype=torch.uint8, device=kept.device).scatter(1, kept, 1)
    return torch.sort(is_kept, dim=1, stable=True).indices[:, : num_rows - kept.shape[1]]


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x [N, L, D]``, ``rows [N, K]`` -> ``[N, K, D]``, differentiable in ``x``."""
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def cosine_matrix(rows: Tensor) -> Tensor:
    """Cosine of each pair of rows, ``[N, L, D]`` -> ``[N, L, L]``, in float32 at least."""
    unit = functional.normalize(at_least_float32(rows), dim=-1)
    return unit @ unit.transpose(1, 2)


def farthest_first(distance: Tensor, first: Tensor, num_selected: int, weight: Tensor) -> Tensor:
    """One row after the other, the next being that of greatest weight times distance to the nearest one selected.

    Args:
        distance: ``[N, L, L]``.
        first: int64 ``[N]``, the row to begin with.
        num_selected: at least 1.
        weight: ``[N, L]``.

    Returns:
        int64 ``[N, num_selected]``, distinct and ascending; of equals the lower index was selected.
    """
    selected = [first[:, None]]
    to_selected = torch.full_like(weight, math.inf)
    is_selected = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(num_selected - 1):
        to_selected = torch.minimum(to_selected, gather_rows(distance, selected[-1])[:, 0])
        is_selected = is_selected.scatter(1, selected[-1], True)
        selected.append((weight * to_selected).masked_fill(is_selected, -math.inf).argmax(dim=1, keepdim=True))
    return torch.cat(selected, dim=1).sort(dim=1).values


def uniform_indices(num_selected: int, num_patches: int, device: torch.device) -> Tensor:
    """Indices evenly spaced over the patches in raster order, each in the middle of its interval: int64 ``[K]``."""
    steps = torch.arange(num_selected, device=device)
    return (2 * steps + 1) * num_patches // (2 * num_selected)


def random_indices(num_selected: int, num_patches: int, seed: int, device: torch.device) -> Tensor:
    """A seeded random subset of the patches, ascending: ``[K]``.

    The order is that of a hash (SplitMix64) of seed and index, in integer arithmetic: the same on every device, torch
    version and batch, and made where it is needed, without a copy from the host.
    """
    state = (torch.arange(num_patches, device=device) + 1) * _signed(0x9E3779B97F4A7C15)
    state = _mix(state + _signed((seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64))
    return torch.sort(torch.sort(state, stable=True).indices[:num_selected]).values


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 products wrap, and masks turn torch's arithmetic shift into a logical one."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return state ^ ((state >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit ``value``."""
    return value - 2**64 if value >= 2**63 else value
