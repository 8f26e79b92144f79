"""A vision tower run by a method's plan: on a smaller image, or on fewer patches in its later layers.

Shapes: N crops, L rows, P patches of the grid, K patches left, D the tower's width.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from vzip.compressors.base import Compressor
from vzip.compressors.plan import LayerState, TowerPlan, TowerPruner
from vzip.compressors.vision import Signal, VisionOutput
from vzip.errors import UnsupportedModelError
from vzip.ops.grid import middle_places
from vzip.ops.select import gather_rows
from vzip.ops.uncompiled import uncompiled

from .structure import Tower
from .tap import record_output, run_tower
from .units import as_units


def run_for(
    compressor: Compressor, tower: Tower, pixel_values: Tensor, select_layer: int, stock_offset: int | None = None
) -> VisionOutput:
    """Runs the tower as the method needs it; raises as ``run_tower`` and ``run_planned``."""
    plan = None if compressor.tower_use == "whole" else compressor.plan(tower.geometry.shape())
    if plan is None:
        return run_tower(tower, pixel_values, select_layer, compressor.reads(), stock_offset)
    return run_planned(tower, pixel_values, select_layer, plan, stock_offset)


def run_planned(
    tower: Tower, pixel_values: Tensor, select_layer: int, plan: TowerPlan, stock_offset: int | None = None
) -> VisionOutput:
    """Encodes crops up to the select layer by a plan.

    Args:
        tower, pixel_values, select_layer, stock_offset: as for ``run_tower``.
        plan: of the method, for this tower's grid of units.

    Returns:
        ``VisionOutput`` of all places of the grid: ``hidden [N, U, D]`` is zero where no patch is left; the signal
        ``present`` says where. The row of a resized image's patch is that of the place in its middle.

    Raises:
        PromptError: pixels of a wrong shape.
        UnsupportedModelError: patches are to be dropped, and no layer runs.
    """
    geometry, shape = tower.geometry, tower.geometry.shape()
    num_layers, first = geometry.num_layers_to_run(select_layer), int(shape.has_cls)
    side, grid = geometry.unit_side, plan.grid or shape.grid
    patches = (grid[0] * side, grid[1] * side)
    hidden = tower.embed(pixel_values, patches)
    if plan.pruner is None:
        for index in range(num_layers):
            hidden = tower.run_layer(index, hidden)
        hidden = as_units(VisionOutput(hidden, geometry.has_cls, patches), side).hidden
        left = middle_places(shape.grid, grid, hidden.device).expand(len(hidden), -1)
    elif num_layers == 0:
        raise UnsupportedModelError(
            f"vision_feature_layer={select_layer} is the input of the first layer, so no layer runs between which"
            " patches could be dropped; use a layer from 1 up, or another method."
        )
    else:
        hidden, left = _pruned(tower, hidden, num_layers, plan.pruner)
    rows = functional.pad(left + first, (first, 0))
    num_crops, _, width = hidden.shape
    whole = hidden.new_zeros(num_crops, shape.num_units, width)
    whole = whole.scatter(1, rows[..., None].expand(-1, -1, width), hidden)
    present = torch.zeros(num_crops, shape.num_patches, device=hidden.device).scatter(1, left, 1.0)
    return VisionOutput(
        whole, shape.has_cls, shape.grid, stock_offset=stock_offset, signals={Signal("present"): present}
    )


@torch.compiler.disable(reason="vzip: how many patches are dropped depends on the image, so fullgraph=True cannot be")
def _pruned(tower: Tower, hidden: Tensor, num_layers: int, pruner: TowerPruner) -> tuple[Tensor, Tensor]:
    """The layers run on ever fewer patches: ``[N, 1 + K, D]``, and which are left, int64 ``[N, K]``.

    After a cut crops may differ in length: the shorter ones are padded, and the padding is masked. Without contents (on
    the meta device, in an estimate of memory) nothing is known to go before the last cut.
    """
    num_crops, num_patches = hidden.shape[0], hidden.shape[1] - 1
    left = torch.arange(num_patches, device=hidden.device).expand(num_crops, -1)
    counts = torch.full((num_crops,), num_patches, device=hidden.device)
    shown: Tensor | None = None
    score: Tensor | None = None
    cuts = pruner.cuts(num_layers)
    has_contents = hidden.device.type != "meta" and not isinstance(hidden, FakeTensor)
    for index in range(num_layers):
        mask = tower.mask(hidden, shown)
        if hidden.shape[1] - 1 <= pruner.num_tokens or index > cuts[-1]:
            hidden = tower.run_layer(index, hidden, mask)
            continue
        queries, keys, scale = tower.attention_of(index)
        taps = {"queries": queries, "keys": keys, "values": tower.values_of(index)}
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(uncompiled())  # a compiled layer would skip the hooks
            for name, module in taps.items():
                stack.enter_context(record_output(module, name, found))
            hidden = tower.run_layer(index, hidden, mask)
        state = LayerState(
            index,
            num_layers,
            **found,
            num_heads=tower.num_heads,
            scale=scale,
            num_patches=counts,
            shown=shown,
            carried=score,
        )
        score, dropped = _judged(pruner, state)
        is_last, longest = index == cuts[-1], pruner.num_tokens
        if index not in cuts or not (is_last or has_contents):
            continue
        counts = torch.full_like(counts, longest) if is_last else (counts - dropped).clamp(min=longest)
        lengths = [longest] if is_last else counts.tolist()  # the host waits: the next layer's shape depends on it
        stay, is_there = _highest(score, counts, shown, max(lengths))
        hidden = gather_rows(hidden, functional.pad(stay + 1, (1, 0)))
        left, score = left.gather(1, stay), score.gather(1, stay)
        shown = None if len(set(lengths)) == 1 else functional.pad(is_there, (1, 0), value=True)
    return hidden, left


def _judged(pruner: TowerPruner, state: LayerState) -> tuple[Tensor, Tensor]:
    device = state.keys.device.type
    # Under autocast, as in a training, float32 scores would be bfloat16 ones.
    with torch.no_grad(), torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
        return pruner.judge(state)


def _highest(score: Tensor, counts: Tensor, shown: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """The ``counts [N]`` patches of highest ``score [N, P]``, ascending; of equal ones the lower index.

    Returns:
        int64 ``[N, longest]``, with any patch where a crop has fewer, and bool ``[N, longest]``, False there.
    """
    num_patches = score.shape[1]
    if shown is not None:
        score = score.masked_fill(~shown[:, 1:], -torch.inf)
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    number = torch.arange(num_patches, device=score.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, number)
    stay = torch.where(rank < counts[:, None], number, num_patches).sort(dim=1).values[:, :longest]
    return stay.clamp(max=num_patches - 1), stay < num_patches
