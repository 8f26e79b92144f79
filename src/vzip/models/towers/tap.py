"""Running a vision tower up to the select layer and reading one layer's queries and keys on the way.

The tower keeps its own attention kernel (SDPA, flash): attention is one softmax row computed from the projections, so
no map is built, no list of hidden states is kept, and layers after the last one that is read do not run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from vzip.compressors.base import VisionOutput
from vzip.errors import UnsupportedModelError
from vzip.ops.attention import cls_attention, key_norms, mean_keys, received_attention

from .structure import Tower


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
    score_layer: int | None = None,
) -> VisionOutput:
    """Encodes crops up to the select layer.

    Gradients flow wherever the caller has them enabled. Equal bit for bit to ``hidden_states[select_layer]`` of the
    tower's own forward pass.

    Args:
        tower: from ``find_tower``.
        pixel_values: ``[N, 3, h, w]``.
        select_layer: index into the tower's hidden states, as ``config.vision_feature_layer``: -2 is the output of the
            second-last layer, 0 the input of the first.
        requires: names of ``Compressor.REQUIRABLE`` as needed; nothing else is read.
        stock_offset: handed on to ``VisionOutput``.
        score_layer: the layer that scores and keys are read at, an index as ``select_layer``; None: the select layer.
            Where it is a later one, the layers up to it run for the scores' sake; the output stays the select layer's.

    Returns:
        ``VisionOutput`` with ``hidden [N, L, D]``, scores ``[N, P]`` and ``keys [N, L, d]`` as asked for.

    Raises:
        PromptError: pixels of a wrong shape.
        UnsupportedModelError: no such layer, or attention asked for at layer 0, before any attention.
    """
    num_layers = tower.geometry.num_layers_to_run(select_layer)
    scored = num_layers if score_layer is None else tower.geometry.num_layers_to_run(score_layer)
    if requires and scored == 0:
        raise UnsupportedModelError(
            f"vision_feature_layer={select_layer if score_layer is None else score_layer} is the input of the first"
            " layer, where there is no attention to select tokens by; use a layer from 1 up, or compressor=none."
        )
    hidden = selected = tower.embed(pixel_values)
    projections: dict[str, Tensor] = {}
    scale = 1.0
    with ExitStack() as stack:
        if requires:
            query_projection, key_projection, scale = tower.attention_of(scored - 1)
            stack.enter_context(_record_output(key_projection, "keys", projections))
            if requires & {"attention", "received_attention"}:
                stack.enter_context(_record_output(query_projection, "queries", projections))
        for index in range(max(num_layers, scored if requires else 0)):
            hidden = tower.layers[index](hidden, None)
            if index + 1 == num_layers:
                selected = hidden
    read = {name: _READERS[name](projections, tower, scale) for name in sorted(requires)}
    return VisionOutput(selected, tower.geometry.has_cls, tower.geometry.grid, stock_offset=stock_offset, **read)


def _attention(projections: dict[str, Tensor], tower: Tower, scale: float) -> Tensor:
    if not tower.geometry.has_cls:
        return _received_attention(projections, tower, scale)
    return cls_attention(projections["queries"], projections["keys"], tower.num_heads, scale)


def _received_attention(projections: dict[str, Tensor], tower: Tower, scale: float) -> Tensor:
    received = received_attention(projections["queries"], projections["keys"], tower.num_heads, scale)
    return received[:, int(tower.geometry.has_cls) :]


def _key_norms(projections: dict[str, Tensor], tower: Tower, scale: float) -> Tensor:
    return key_norms(projections["keys"], tower.num_heads)[:, int(tower.geometry.has_cls) :]


def _keys(projections: dict[str, Tensor], tower: Tower, scale: float) -> Tensor:
    return mean_keys(projections["keys"], tower.num_heads)


# What can be read, by its name in ``Compressor.REQUIRABLE``.
_READERS: Mapping[str, Callable[[dict[str, Tensor], Tower, float], Tensor]] = {
    "attention": _attention,
    "received_attention": _received_attention,
    "key_norms": _key_norms,
    "keys": _keys,
}
