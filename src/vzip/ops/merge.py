"""Merging the rows that were not kept into contextual tokens (VisionZip, Alg. 2, and the published code's arithmetic).

Shapes: N crops, R rows to merge, C contextual tokens, D the tower's width, d the metric's width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .attention import at_least_float32

MergeRule = Literal["sum", "mean"]
MERGE_RULES: tuple[str, ...] = ("sum", "mean")


def target_positions(num_rows: int, num_contextual: int, device: torch.device) -> Tensor:
    """Positions of the merge targets among R rows: 0, step, 2 step, ... with step = R // C. int64 ``[C]``.

    Needs 1 <= C <= R. Where C does not divide R, the rows after the last target are a longer tail, as published.
    """
    step = max(1, num_rows // num_contextual)
    return torch.arange(num_contextual, device=device) * step


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


def merge_rows(
    hidden: Tensor, assignment: Tensor, num_contextual: int, rule: MergeRule, positions: Tensor | None = None
) -> Tensor:
    """Contextual tokens from rows and their targets.

    ``"sum"``: target + mean of the rows assigned to it (the target alone where there are none): what the published
    code computes and the paper's tables were made with. ``"mean"``: the average of the target and its rows, as the
    paper's text reads. Sums run in float32 at least and return to the type of ``hidden``.

    Args:
        hidden: ``[N, R, D]``, the rows to merge.
        assignment: int64 ``[N, R]`` from ``assign_to_targets``.
        num_contextual: C.
        rule: ``"sum"`` or ``"mean"``.
        positions: as for ``assign_to_targets``.

    Returns:
        ``[N, C, D]`` in the order of the targets; differentiable in ``hidden``.
    """
    num_rows = hidden.shape[1]
    if positions is None:
        positions = target_positions(num_rows, num_contextual, hidden.device)
    wide = at_least_float32(hidden)
    targets = wide.index_select(1, positions)
    # A product with 0/1 weights, not scatter_add: atomics would make GPU sums depend on the order of arrival.
    slots = torch.arange(num_contextual, device=hidden.device)
    member = (assignment.unsqueeze(1) == slots[None, :, None]).to(wide.dtype)  # [N, C, R]
    is_other = torch.ones(num_rows, dtype=wide.dtype, device=hidden.device).index_fill(0, positions, 0)
    member = member * is_other
    total = member @ wide
    count = member.sum(dim=-1, keepdim=True)
    merged = targets + total / count.clamp(min=1) if rule == "sum" else (targets + total) / (count + 1)
    return merged.to(hidden.dtype)
