"""Running a vision tower up to the select layer and reading some layers' queries and keys on the way.

The tower keeps its own attention kernel (SDPA, flash): attention is one softmax row computed from the projections, so
no map is built, no list of hidden states is kept, and layers after the last one that is read do not run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vzip.compressors.vision import Signal, VisionOutput, of_tower
from vzip.errors import UnsupportedModelError
from vzip.ops.attention import at_least_float32, cls_attention, key_norms, mean_keys, received_attention
from vzip.ops.uncompiled import uncompiled

from .structure import Tower
from .units import as_units


@contextmanager
def record_output(module: nn.Module, name: str, into: dict[str, Tensor]) -> Iterator[None]:
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
    signals: Iterable[Signal] = (),
    stock_offset: int | None = None,
) -> VisionOutput:
    """Encodes crops up to the select layer.

    Gradients flow wherever the caller has them enabled. Equal bit for bit to ``hidden_states[select_layer]`` of the
    tower's own forward pass. Can be captured as one graph by ``torch.compile``; outside of it compiled layers that are
    tapped run eagerly.

    Args:
        tower: from ``find_tower``.
        pixel_values: ``[N, 3, h, w]``.
        select_layer: index into the tower's hidden states, as ``config.vision_feature_layer``: -2 is the output of the
            second-last layer, 0 the input of the first.
        signals: what a method reads, of any layers; nothing else is recorded. Where a layer is a later one than the
            select layer, the layers up to it run for its sake; the output stays the select layer's. ``projected`` is
            not the tower's to record.
        stock_offset: handed on to ``VisionOutput``.

    Returns:
        ``VisionOutput`` with ``hidden [N, L, D]`` and the signals, by units where these are squares of patches.

    Raises:
        PromptError: pixels of a wrong shape.
        UnsupportedModelError: no such layer, or attention asked for at layer 0, before any attention.
    """
    num_layers = tower.geometry.num_layers_to_run(select_layer)
    recorded = of_tower(signals)
    layer_of = {s: tower.geometry.num_layers_to_run(select_layer if s.layer is None else s.layer) for s in recorded}
    for signal, layer in layer_of.items():
        if layer == 0 and signal.name != "hidden":
            raise UnsupportedModelError(
                f"vision_feature_layer={select_layer if signal.layer is None else signal.layer} is the input of the"
                " first layer, where there is no attention to select tokens by; use a layer from 1 up, or"
                " compressor=none."
            )
    tapped: dict[int, set[str]] = {}  # layer -> the signals read of its projections
    for signal, layer in layer_of.items():
        if signal.name != "hidden":
            tapped.setdefault(layer, set()).add(signal.name)
    kept = {num_layers, *(layer for signal, layer in layer_of.items() if signal.name == "hidden")}
    hidden = tower.embed(pixel_values)
    states = {0: hidden}
    projections: dict[str, Tensor] = {}
    in_graph = torch.compiler.is_compiling()  # which has no hooks
    with nullcontext() if in_graph else _reading(tower, tapped, projections):
        for index in range(max([num_layers, *layer_of.values()])):
            if in_graph and index + 1 in tapped:
                of_queries = tapped[index + 1].intersection(_OF_QUERIES)
                needs_all = not (tower.geometry.has_cls and of_queries <= {*_OF_CLS})
                keys, queries = tower.projections(
                    index, hidden, num_queries=0 if not of_queries else None if needs_all else 1
                )
                projections[f"keys{index + 1}"] = keys
                if queries is not None:
                    projections[f"queries{index + 1}"] = queries
            hidden = tower.run_layer(index, hidden)
            if index + 1 in kept:
                states[index + 1] = hidden
    values = {}
    for signal, layer in layer_of.items():
        if signal.name == "hidden":
            values[signal] = states[layer]
        else:
            keys, queries = projections[f"keys{layer}"], projections.get(f"queries{layer}")
            values[signal] = _READERS[signal.name](tower, layer, keys, queries)
    vision = VisionOutput(
        states[num_layers],
        tower.geometry.has_cls,
        tower.geometry.grid,
        attention=values.pop(Signal("attention"), None),
        keys=values.pop(Signal("keys"), None),
        stock_offset=stock_offset,
        signals=values,
    )
    return as_units(vision, tower.geometry.unit_side)


@contextmanager
def _reading(tower: Tower, tapped: Mapping[int, set[str]], into: dict[str, Tensor]) -> Iterator[None]:
    """Stores what these layers' (1-based) projections make for signals, while they run within the context."""
    with ExitStack() as stack:
        if tapped:
            stack.enter_context(uncompiled())  # a compiled layer would skip the hooks
        for layer, names in tapped.items():
            query_projection, key_projection, _ = tower.attention_of(layer - 1)
            stack.enter_context(record_output(key_projection, f"keys{layer}", into))
            if names.intersection(_OF_QUERIES):
                stack.enter_context(record_output(query_projection, f"queries{layer}", into))
        yield


def _attention(tower: Tower, layer: int, keys: Tensor, queries: Tensor | None) -> Tensor:
    assert queries is not None
    if not tower.geometry.has_cls:
        return _received_attention(tower, layer, keys, queries)
    return cls_attention(queries, keys, tower.num_heads, tower.attention_of(layer - 1)[2])


def _undivided_attention(tower: Tower, layer: int, keys: Tensor, queries: Tensor | None) -> Tensor:
    assert queries is not None
    function = cls_attention if tower.geometry.has_cls else received_attention
    return function(queries, keys, 1, keys.shape[-1] ** -0.5)


def _received_attention(tower: Tower, layer: int, keys: Tensor, queries: Tensor | None) -> Tensor:
    assert queries is not None
    received = received_attention(queries, keys, tower.num_heads, tower.attention_of(layer - 1)[2])
    return received[:, int(tower.geometry.has_cls) :]


def _key_norms(tower: Tower, _layer: int, keys: Tensor, _queries: Tensor | None) -> Tensor:
    return key_norms(keys, tower.num_heads)[:, int(tower.geometry.has_cls) :]


def _keys(tower: Tower, _layer: int, keys: Tensor, _queries: Tensor | None) -> Tensor:
    return mean_keys(keys, tower.num_heads)


def _undivided_keys(_tower: Tower, _layer: int, keys: Tensor, _queries: Tensor | None) -> Tensor:
    return at_least_float32(keys)


_OF_CLS = ("attention", "undivided_attention")  # of CLS's query alone, where there is a CLS
_OF_QUERIES = ("received_attention", *_OF_CLS)
# What a layer's projections give, by the signal's name.
_READERS: Mapping[str, Callable[[Tower, int, Tensor, Tensor | None], Tensor]] = {
    "attention": _attention,
    "received_attention": _received_attention,
    "undivided_attention": _undivided_attention,
    "key_norms": _key_norms,
    "keys": _keys,
    "undivided_keys": _undivided_keys,
}
