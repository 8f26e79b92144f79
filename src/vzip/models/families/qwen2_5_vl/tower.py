"""Running the vision tower of Qwen2.5-VL (and Qwen3-VL) and reading signals of its merge units on the way.

The tower runs as Hugging Face runs it, all images in one call. Inside it rows stand in *window order*: merge units
(2 x 2 patches that become one visual token) sorted by the attention window they lie in. What is recorded there is
averaged over each unit's patches and put back into reading order, which is the order of the visual tokens. Qwen3-VL has
no windows: reading order throughout.

Shapes: S patches and M merge units of all images, H heads, d = head width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vzip.compressors.vision import SCORES, Signal, VisionOutput
from vzip.errors import UnsupportedModelError
from vzip.ops.attention import at_least_float32, key_norms, mean_keys, received_attention

from ...devices import execution_device

Grid = tuple[int, int, int]  # temporal steps, rows and columns of patches


@dataclass(frozen=True)
class UnitTower:
    """A tower whose visual tokens are groups of patches.

    Attributes:
        module: Hugging Face's.
        merge_size: side of a merge unit in patches.
        window: side of an attention window in merge units; None: there are no windows.
        full_blocks: blocks (0-based) whose attention sees a whole image (a temporal step of a video).
        num_layers: blocks.
    """

    module: nn.Module
    merge_size: int
    window: int | None
    full_blocks: tuple[int, ...]
    num_layers: int

    @classmethod
    def of(cls, module: nn.Module, config: Any) -> UnitTower:
        """From Hugging Face's module and ``vision_config``; raises UnsupportedModelError for what cannot be served."""
        merge_size = config.spatial_merge_size
        if not hasattr(config, "window_size"):
            return cls(module, merge_size, None, tuple(range(config.depth)), config.depth)
        window = config.window_size // merge_size // config.patch_size
        full_blocks = tuple(index for index in config.fullatt_block_indexes if index < config.depth)
        if window < 1 or not full_blocks:
            raise UnsupportedModelError(
                f"vision_config.window_size={config.window_size}, fullatt_block_indexes="
                f"{list(config.fullatt_block_indexes)}: a window must hold a merge unit of {merge_size} x {merge_size}"
                f" patches of {config.patch_size} pixels, and one of the {config.depth} blocks must attend to the whole"
                " image, since tokens are scored there. They are settings of the checkpoint's config.json."
            )
        return cls(module, merge_size, window, full_blocks, config.depth)

    @property
    def score_layer(self) -> int:
        """Where a method reads that names no layer: the last one whose attention sees the whole image."""
        return max(self.full_blocks) + 1

    def layer_of(self, signal: Signal) -> int:
        """Index into the tower's hidden states, 0 or more."""
        if signal.layer is None:
            return self.score_layer
        return signal.layer if signal.layer >= 0 else self.num_layers + 1 + signal.layer

    def run(self, pixel_values: Tensor, grids: Sequence[Grid], signals: Iterable[Signal]) -> VisionOutput:
        """Encodes images.

        Args:
            pixel_values: ``[S, values of a patch]``, as the processor returns them.
            grids: of each image.
            signals: as for ``towers.tap.run_tower``; of layer ``score_layer`` where they name none.

        Returns:
            ``VisionOutput`` of one crop that holds the units of all images, ``hidden [1, M, d_text]`` being what the
            merger made of them, and ``planes`` what the other mergers made of earlier blocks' output.
        """
        recorded = {s: self.layer_of(s) for s in signals if s.name != "projected" and s != Signal("hidden")}
        module, into = self.module, dict[str, Any]()
        patches = module.get_submodule("patch_embed.proj")
        device, dtype = execution_device(patches), next(patches.parameters()).dtype
        grid_thw = torch.tensor(grids, device=device)
        with ExitStack() as stack:
            for layer, is_hidden in {(layer, signal.name == "hidden") for signal, layer in recorded.items()}:
                stack.enter_context(_recording(module, layer, is_hidden, into))
            output = module(pixel_values.to(device, dtype), grid_thw=grid_thw, return_dict=True)
        device = output.pooler_output.device  # where blocks are spread over devices, the merger's
        values = {s: self._units(s, layer, into, grids).to(device) for s, layer in recorded.items()}
        if self.window is not None:
            back = window_order(grids, self.merge_size, self.window).argsort().to(device)
            values = {signal: value[back] for signal, value in values.items()}
        deeper = [plane.to(device) for plane in getattr(output, "deepstack_features", None) or ()]
        signals_of_all = {signal: value[None] for signal, value in values.items()}
        num_units = output.pooler_output.shape[0]
        return VisionOutput(
            output.pooler_output[None],
            has_cls=False,
            grid=(1, num_units),
            attention=signals_of_all.pop(Signal("attention"), None),
            keys=signals_of_all.pop(Signal("keys"), None),
            stock_offset=0,
            signals=signals_of_all,
            fixed=False,
            planes=torch.cat(deeper, dim=-1)[None] if deeper else None,
        )

    def num_operations(self, grids: Sequence[Grid], with_merger: bool = True, is_scored: bool = False) -> int:
        """Operations of the tower, a multiply-add being two; norms and softmax are not counted.

        Args:
            grids: of each image.
            with_merger: count what makes visual tokens of merge units, too.
            is_scored: count the products by which ``attention`` is computed beside the tower's own.
        """
        num_patches = sum(steps * rows * cols for steps, rows, cols in grids)
        attended = sum(steps * (rows * cols) ** 2 for steps, rows, cols in grids)  # in a block that sees all
        in_windows = 0 if self.window is None else num_patches * (self.window * self.merge_size) ** 2
        blocks = self.module.get_submodule("blocks")
        weights = [p for p in (*self.module.get_submodule("patch_embed").parameters(), *blocks.parameters())]
        width = len(weights[0])
        num_full = len(self.full_blocks)
        pairs = 2 * (num_full * attended + (self.num_layers - num_full) * in_windows) + is_scored * attended
        linear = num_patches * sum(p.numel() for p in weights if p.ndim > 1)
        if with_merger:
            mergers = [p for name, p in self.module.named_parameters() if "merger" in name.partition(".")[0]]
            linear += num_patches // self.merge_size**2 * sum(p.numel() for p in mergers if p.ndim > 1)
        return 2 * (linear + pairs * width)

    def _units(self, signal: Signal, layer: int, into: dict[str, Any], grids: Sequence[Grid]) -> Tensor:
        """A signal of every merge unit in window order, ``[M]`` or ``[M, width]``."""
        if signal.name == "hidden":
            rows: Tensor = into[f"hidden{layer}"]
        else:
            attention: Any = self.module.get_submodule(f"blocks.{layer - 1}.attn")
            queries, keys = _rotated(into[f"qkv{layer}"], attention.num_heads, into[f"rope{layer}"])
            if signal.name == "keys":
                rows = mean_keys(keys[None], attention.num_heads)[0]
            elif signal.name == "key_norms":
                rows = key_norms(keys[None], attention.num_heads)[0]
            elif signal.name == "undivided_keys":
                rows = keys
            elif signal.name == "undivided_attention":
                rows = _received(queries, keys, grids, 1, keys.shape[-1] ** -0.5)
            else:
                rows = _received(queries, keys, grids, attention.num_heads, float(attention.scaling))
        return at_least_float32(rows).unflatten(0, (-1, self.merge_size**2)).mean(dim=1)


def window_order(grids: Sequence[Grid], merge_size: int, window: int) -> Tensor:
    """Which merge unit, in reading order, stands at each place in the tower: int64 ``[M]`` on the CPU.

    Windows follow one another line by line, as units do within each; those at the right and lower edge may be smaller.
    """
    orders, start = [], 0
    for steps, height, width in grids:
        rows, cols = height // merge_size, width // merge_size
        step, row, col = torch.meshgrid(torch.arange(steps), torch.arange(rows), torch.arange(cols), indexing="ij")
        number = ((step * rows + row // window) * cols + col // window) * window**2
        orders.append((number + row % window * window + col % window).flatten().argsort() + start)
        start += steps * rows * cols
    return torch.cat(orders)


@contextmanager
def _recording(module: nn.Module, layer: int, is_hidden: bool, into: dict[str, Any]) -> Iterator[None]:
    """Stores hidden states or projections of a layer while the context lasts; other threads' runs are not heard."""
    owner = threading.get_ident()

    def keep(**values: Any) -> None:
        if threading.get_ident() == owner:
            into.update({f"{name}{layer}": value for name, value in values.items()})

    if is_hidden and layer == 0:
        first = module.get_submodule("blocks.0")
        handles = [first.register_forward_pre_hook(lambda _module, args: keep(hidden=args[0]))]
    elif is_hidden:
        block = module.get_submodule(f"blocks.{layer - 1}")
        handles = [block.register_forward_hook(lambda _module, _args, output: keep(hidden=output))]
    else:
        attention = module.get_submodule(f"blocks.{layer - 1}.attn")
        handles = [
            attention.register_forward_pre_hook(
                lambda _module, _args, kwargs: keep(rope=kwargs["position_embeddings"]), with_kwargs=True
            ),
            attention.get_submodule("qkv").register_forward_hook(lambda _module, _args, output: keep(qkv=output)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rotated(qkv: Tensor, num_heads: int, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys with their rotary positions, ``[S, H * d]`` each, in float32 at least.

    Args:
        qkv: ``[S, 3 * H * d]``, as the block projects it.
        num_heads: H.
        rope: cosines and sines ``[S, d]``.
    """
    cos, sin = (at_least_float32(part)[:, None] for part in rope)
    queries, keys, _ = qkv.unflatten(-1, (3, num_heads, -1)).unbind(1)

    def rotate(x: Tensor) -> Tensor:
        x = at_least_float32(x)
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-second, first], dim=-1) * sin).flatten(1)

    return rotate(queries), rotate(keys)


def _received(queries: Tensor, keys: Tensor, grids: Sequence[Grid], num_heads: int, scale: float) -> Tensor:
    """Mean attention that every patch receives from its own image (temporal step): ``[S]``, in the order given."""
    scores, start = [], 0
    for steps, height, width in grids:
        own = slice(start, start + steps * height * width)
        segments = [rows[own].unflatten(0, (steps, height * width)) for rows in (queries, keys)]
        scores.append(received_attention(segments[0], segments[1], num_heads, scale).flatten())
        start = own.stop
    return torch.cat(scores)


def check_signal(tower: UnitTower, signal: Signal, key: str) -> None:
    """Raises UnsupportedModelError for a score of a layer whose attention sees windows alone."""
    layer = tower.layer_of(signal)
    if signal.name in SCORES and signal.name != "key_norms" and layer - 1 not in tower.full_blocks:
        allowed = ", ".join(str(block + 1) for block in tower.full_blocks)
        raise UnsupportedModelError(
            f"compressor.{key}={signal.layer}, where {signal.name} is read: this layer of the vision tower attends"
            " within windows, which differ in size, so its scores cannot be compared over the image. Layers that see"
            f" all of it: {allowed}; null is the last of them."
        )
