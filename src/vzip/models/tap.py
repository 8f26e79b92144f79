"""Running a vision tower up to the select layer and reading one layer's queries and keys on the way.

The tower keeps its own attention kernel (SDPA, flash): attention is one softmax row computed from the projections, so
no map is built, no list of hidden states is kept, and layers after the select layer do not run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from vzip.compressors.base import VisionOutput
from vzip.errors import UnsupportedModelError
from vzip.ops.attention import cls_attention, mean_keys, received_attention

from .towers import Tower


@contextmanager
def _record_output(module: nn.Module, name: str, into: dict[str, Tensor]) -> Iterator[None]:
    """Stores the module's output under ``name`` while the context lasts.

    The hook returns nothing, so it changes nothing; calls from other threads that share the model are not ours.
    """
    owner = threading.get_ident()

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if threading.get_ident() == owner:
            into[name] = output

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run_tower(
    tower: Tower,
    pixel_values: Tensor,
    select_layer: int,
    requires: frozenset[str] = frozenset(),
    stock_offset: int | None = None,
) -> VisionOutput:
    """Encodes crops up to the select layer.

    Gradients flow wherever the caller has them enabled. Equal bit for bit to ``hidden_states[select_layer]`` of the
    tower's own forward pass.

    Args:
        tower: from ``find_tower``.
        pixel_values: ``[N, 3, h, w]``.
        select_layer: index into the tower's hidden states, as ``config.vision_feature_layer``: -2 is the output of the
            second-last layer, 0 the input of the first.
        requires: ``"attention"`` and ``"keys"`` as needed; nothing else is read. Both are of the same layer as the
            output (the last one that runs).
        stock_offset: handed on to ``VisionOutput``.

    Returns:
        ``VisionOutput`` with ``hidden [N, L, D]``, ``attention [N, P]`` and ``keys [N, L, d]`` or None.

    Raises:
        PromptError: pixels of a wrong shape.
        UnsupportedModelError: no such layer, or attention asked for at layer 0, before any attention.
    """
    num_layers = tower.geometry.num_layers_to_run(select_layer)
    if requires and num_layers == 0:
        raise UnsupportedModelError(
            f"vision_feature_layer={select_layer} is the input of the first layer, where there is no attention to"
            " select tokens by; use a layer from 1 up, or compressor=none."
        )
    hidden = tower.embed(pixel_values)
    projections: dict[str, Tensor] = {}
    scale = 1.0
    with ExitStack() as stack:
        if requires:
            query_projection, key_projection, scale = tower.attention_of(num_layers - 1)
            stack.enter_context(_record_output(key_projection, "keys", projections))
            if "attention" in requires:
                stack.enter_context(_record_output(query_projection, "queries", projections))
        for index in range(num_layers):
            hidden = tower.layers[index](hidden, None)

    geometry = tower.geometry
    attention = keys = None
    if "attention" in requires:
        score = cls_attention if geometry.has_cls else received_attention
        attention = score(projections["queries"], projections["keys"], tower.num_heads, scale)
    if "keys" in requires:
        keys = mean_keys(projections["keys"], tower.num_heads)
    return VisionOutput(hidden, geometry.has_cls, geometry.grid, attention, keys, stock_offset)
