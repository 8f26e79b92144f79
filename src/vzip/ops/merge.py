"""Merging the rows that were not kept into contextual tokens (VisionZip, Alg. 2, and the published code's arithmetic).

Shapes: N crops, R rows to merge, C contextual tokens, d the metric's width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .attention import at_least_float32
from .select import gather_rows

MergeRule = Literal["sum", "mean"]
MERGE_RULES: tuple[str, ...] = ("sum", "mean")


def target_positions(num_rows: int, num_contextual: int, device: torch.device) -> Tensor:
    """Positions of the merge targets among R rows: 0, step, 2 step, ... with step = R // C. int64 ``[C]``.

    Needs 1 <= C <= R. Where C does not divide R, the rows after the last target are a longer tail, as published.
    """
    step = max(1, num_rows // num_contextual)
    return torch.arange(num_contextual, device=device) * step


def targets_of(rows: Tensor, num_contextual: int) -> Tensor:
    """The merge targets among ``rows [N, R, ...]``: those at ``target_positions``, ``[N, C, ...]``, a view."""
    step = max(1, rows.shape[1] // num_contextual)
    return rows[:, : num_contextual * step : step]


def assign_to_targets(keys: Tensor, num_contextual: int, positions: Tensor | None = None) -> Tensor:
    """The target each row is merged into: highest cosine similarity of keys, ties to the lower target.

    Args:
        keys: ``[N, R, d]``, of the rows to merge, in raster order.
        num_contextual: C.
        positions: int64 ``[C]``, where the targets are among the rows, ascending; None: ``target_positions``.

    Returns:
        int64 ``[N, R]`` with values 0..C-1; a target is assigned to itself.
    """
    metric = functional.normalize(at_least_float32(keys), dim=-1)
    if positions is None:
        positions = target_positions(keys.shape[1], num_contextual, keys.device)
    similarity = metric @ metric.index_select(1, positions).transpose(1, 2)  # [N, R, C]
    nearest = similarity.argmax(dim=-1)  # torch documents: the first of several maxima
    own = torch.arange(num_contextual, device=keys.device).expand(keys.shape[0], -1)
    return nearest.scatter(1, positions.expand(keys.shape[0], -1), own)


def combine_rows(rows: Tensor, place_index: Tensor, merge_index: Tensor, rule: MergeRule, first: int = 0) -> Tensor:
    """Tokens from rows: those at their places, the later ones joined by the rows that merge into them.

    ``"sum"``: target + mean of the rows assigned to it (the target alone where there are none): what the published
    code computes and the paper's tables were made with. ``"mean"``: the average of the target and its rows, as the
    paper's text reads. Sums run in float32 at least and return to the type of ``rows``.

    Args:
        rows: ``[N, U, E]``.
        place_index: int64 ``[N, K]``, the row that each token begins with.
        merge_index: int64 ``[N, U]``, the token (``first``..K-1) that each other row joins; -1: none.
        rule: ``"sum"`` or ``"mean"``.
        first: tokens before it are joined by none.

    Returns:
        ``[N, K, E]``; differentiable in ``rows``.
    """
    wide = at_least_float32(rows)
    tokens = gather_rows(rows, place_index)
    targets = at_least_float32(tokens[:, first:])
    # A product with 0/1 weights, not scatter_add: atomics would make GPU sums depend on the order of arrival.
    slots = torch.arange(first, place_index.shape[1], device=rows.device)
    member = (merge_index.unsqueeze(1) == slots[None, :, None]).to(wide.dtype)  # [N, K - first, U]
    total = member @ wide
    count = member.sum(dim=-1, keepdim=True)
    merged = targets + total / count.clamp(min=1) if rule == "sum" else (targets + total) / (count + 1)
    merged = merged.to(rows.dtype)
    return torch.cat([tokens[:, :first], merged], dim=1) if first else merged
