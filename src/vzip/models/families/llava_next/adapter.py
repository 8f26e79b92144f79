"""LLaVA-NeXT (``LlavaNextForConditionalGeneration``): a base crop and a grid of tiles, compressed crop by crop.

Packed as the published VisionZip code does (see ``_reading_order``); without compression exactly as Hugging Face does:
the tiles stitched together, the padding cut off, a newline token after each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from transformers import LlavaNextForConditionalGeneration

from vzip.compressors.vision import VisionShape
from vzip.errors import PromptError, UnsupportedModelError
from vzip.media.images import Preprocess
from vzip.models.families.llava_next.anyres import hf_grid, placement, prepare_crops

from ...devices import fetch_parameter
from ...towers.structure import TowerGeometry
from ..base import VisualInputs, check_pixel_values
from ..llava_base import LlavaBase
from ..original.checkpoint import OriginalCheckpoint
from ..original.llava import find_llava

Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TiledShape(VisionShape):
    """An image's shape and how it was cut, read from its tensors once.

    Attributes:
        size: original (height, width) in pixels.
        tiles: (rows, cols) of tiles beside the base crop.
    """

    size: Grid
    tiles: Grid


class LlavaNextAdapter(LlavaBase):
    """Several crops an image, and a newline token."""

    model_class = LlavaNextForConditionalGeneration
    input_names: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "tile_grids")
    has_tiles = True

    @classmethod
    def original(cls, directory: Path) -> OriginalCheckpoint | None:
        found = find_llava(directory)
        return found if found is not None and found.has_tiles else None

    @classmethod
    def check_config(cls, config: Any) -> TowerGeometry:
        geometry = super().check_config(config)
        if cls.read_stock_offset(config) != int(geometry.has_cls):
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy}: LLaVA-NeXT stitches its"
                " crops' patches together, so a tower with CLS needs 'default' and one without needs 'full'. It is a"
                " setting of the checkpoint's config.json."
            )
        side = geometry.image_size
        if any(height % side or width % side for height, width in config.image_grid_pinpoints):
            raise UnsupportedModelError(
                f"image_grid_pinpoints={config.image_grid_pinpoints}: each side must be a multiple of the vision"
                f" tower's {side} pixels. It is a setting of the checkpoint's config.json."
            )
        return geometry

    def newline(self, like: Tensor) -> Tensor:
        return fetch_parameter(self.model.get_submodule("model"), "image_newline").to(like)

    def blank_images(self, num_images: int) -> dict[str, Tensor]:
        height, width = max(self.pinpoints, key=lambda size: size[0] * size[1])
        side = self.image_side
        num_crops = 1 + (height // side) * (width // side)
        return {
            "pixel_values": torch.ones(num_images, num_crops, 3, side, side),
            "image_sizes": torch.tensor([[height, width]] * num_images),
        }

    @property
    def pinpoints(self) -> list[list[int]]:
        """The resolutions an image may be shown at, in pixels."""
        return self.model.config.image_grid_pinpoints

    def prepare_images(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        return prepare_crops(images, image_processor, preprocess, self.pinpoints, self.geometry.image_size)

    def image_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        if "pixel_values" not in tensors:
            return []
        check_pixel_values(tensors["pixel_values"], 5, "[images, max_crops, 3, height, width]")
        num_images, geometry = len(tensors["pixel_values"]), self.geometry
        shapes: list[VisionShape] = []
        layouts = self._layouts(num_images, tensors.get("image_sizes"), tensors.get("tile_grids"))
        for (size, grid), is_tiled in zip(layouts, self._are_tiled(tensors), strict=True):
            num_crops, num_vanilla = 1 + grid[0] * grid[1], self._num_vanilla(size, grid)
            num_newlines = len(self._newline_rows(size, grid))
            if not is_tiled:
                num_crops, num_vanilla, num_newlines = 1, geometry.num_patches + 1, 1
            shapes.append(
                TiledShape(
                    kind="image",
                    num_crops=num_crops,
                    grid=geometry.grid,
                    has_cls=geometry.has_cls,
                    num_vanilla=num_vanilla,
                    num_added=num_newlines,
                    num_placeholders=self._num_written(size, is_tiled),
                    size=size,
                    tiles=grid,
                )
            )
        if tensors["pixel_values"].shape[1] > 1:
            self._check_crops(tensors["pixel_values"], layouts, [shape.num_crops for shape in shapes])
        return shapes

    def _are_tiled(self, tensors: Mapping[str, Tensor]) -> list[bool]:
        """Of each image whether it has tiles; no processor of LLaVA-NeXT gives a base crop alone."""
        num_images, max_crops = tensors["pixel_values"].shape[:2]
        return [max_crops > 1] * num_images

    def _num_written(self, size: Grid, is_tiled: bool) -> int:
        """Placeholders that Hugging Face's processor writes: as its own rule asks for, however the image was cut."""
        return self._num_vanilla(size, hf_grid(*size, self.pinpoints, self.geometry.image_size))

    def _num_vanilla(self, size: Grid, grid: Grid) -> int:
        rows, cols = unpadded(size, *self._stitched(grid))
        return self.geometry.num_patches + len(rows) * (len(cols) + 1)

    def image_crops(self, visual: VisualInputs) -> Tensor:
        pixel_values = visual.tensors["pixel_values"]
        needed = [shape.num_crops for shape in visual.images]
        if all(count == pixel_values.shape[1] for count in needed):
            return pixel_values.flatten(0, 1)
        return torch.cat([own[:count] for own, count in zip(pixel_values, needed, strict=True)])

    def num_tile_columns(self, shape: VisionShape) -> int | None:
        return self._layout(shape)[1][1]

    def whole_index(self, shape: VisionShape) -> Tensor | None:
        """As Hugging Face packs: the base crop, then the tiles stitched, their padding cut off, a newline a line."""
        num_patches, (tile_rows, tile_cols) = self.geometry.num_patches, self.geometry.grid
        base = torch.arange(num_patches)
        if shape.num_crops == 1:
            return torch.cat([base, torch.tensor([-1])])
        size, grid = self._layout(shape)
        tiles = num_patches + torch.arange(grid[0] * grid[1] * num_patches)
        stitched = tiles.view(*grid, tile_rows, tile_cols).transpose(1, 2).reshape(self._stitched(grid))
        rows, cols = unpadded(size, *self._stitched(grid))
        stitched = stitched[rows.start : rows.stop, cols.start : cols.stop]
        return torch.cat([base, functional.pad(stitched, (0, 1), value=-1).flatten()])

    def unit_places(self, shape: VisionShape, device: torch.device) -> Tensor:
        """CLS of any crop has the image's first place; patches that are cut off that of the nearest that is not."""
        num_patches, (tile_rows, tile_cols) = self.geometry.num_patches, self.geometry.grid
        places = torch.arange(num_patches)[None]
        if shape.num_crops > 1:
            _, (grid_rows, grid_cols) = self._layout(shape)
            patch, tile = torch.arange(num_patches), torch.arange(grid_rows * grid_cols)[:, None]
            y, x = tile // grid_cols * tile_rows + patch // tile_cols, tile % grid_cols * tile_cols + patch % tile_cols
            places = torch.cat([places, self._stitched_places(shape, y, x)])
        return functional.pad(places, (int(self.geometry.has_cls), 0)).to(device)

    def newline_places(self, shape: VisionShape) -> Tensor:
        if shape.num_crops == 1:
            return torch.tensor([self.geometry.num_patches])
        size, grid = self._layout(shape)
        return self._stitched_places(shape, torch.tensor(self._newline_rows(size, grid), dtype=torch.int64), None)

    def _stitched_places(self, shape: VisionShape, y: Tensor, x: Tensor | None) -> Tensor:
        """Places of stitched patches, or of the newlines that end their rows; see ``whole_index``."""
        size, grid = self._layout(shape)
        rows, cols = unpadded(size, *self._stitched(grid))
        own = len(cols) if x is None else (x - cols.start).clamp(min=0, max=max(len(cols) - 1, 0))
        line = (y - rows.start).clamp(min=0, max=max(len(rows) - 1, 0))
        return (self.geometry.num_patches + line * (len(cols) + 1) + own).clamp(max=shape.num_vanilla - 1)

    def pack(self, shape: VisionShape, tokens: Tensor, kept: Tensor) -> Tensor:
        newline = self.newline(tokens)
        if len(tokens) == 1:
            return torch.cat([tokens[0], newline[None]])
        size, grid = self._layout(shape)
        return torch.cat([tokens[0], self._interleave(tokens[1:], kept[1:], size, grid, newline)])

    def valid_units(self, visual: VisualInputs) -> Tensor | None:
        if not self.options.drop_padding:
            return None
        (tile_rows, tile_cols), masks = self.geometry.grid, []
        for shape in visual.images:
            size, grid = self._layout(shape)
            # The base crop has no padding.
            mask = torch.ones(shape.num_crops, self.geometry.num_patches, dtype=torch.bool)
            if shape.num_crops > 1:
                rows, cols = self._shown_cells(size, grid)
                stitched = torch.zeros(self._stitched(grid), dtype=torch.bool)
                stitched[rows.start : rows.stop, cols.start : cols.stop] = True
                tiles = stitched.view(grid[0], tile_rows, grid[1], tile_cols).transpose(1, 2)
                mask[1:] = tiles.reshape(shape.num_crops - 1, -1)
            masks.append(mask)
        patches = functional.pad(torch.cat(masks), (int(self.geometry.has_cls), 0), value=True)
        return patches.to(visual.tensors["pixel_values"].device)

    @staticmethod
    def _layout(shape: VisionShape) -> tuple[Grid, Grid]:
        assert isinstance(shape, TiledShape)
        return shape.size, shape.tiles

    def _layouts(
        self, num_images: int, image_sizes: Tensor | None, tile_grids: Tensor | None
    ) -> list[tuple[Grid, Grid]]:
        """For each image its (height, width) in pixels and the (rows, cols) of its tiles, on the host."""
        if num_images == 0:
            return []
        if image_sizes is None:
            raise PromptError(
                f"image_sizes is missing for {num_images} images: {self.model_class.__name__} needs the original"
                " (height, width) of each image, as its Hugging Face processor and preprocess_images return them."
            )
        sizes = _pairs(image_sizes, num_images, "image_sizes", "(height, width) in pixels")
        if tile_grids is None:
            side = self.geometry.image_size
            return [(size, hf_grid(*size, self.pinpoints, side)) for size in sizes]
        return list(zip(sizes, _pairs(tile_grids, num_images, "tile_grids", "(rows, cols) of tiles"), strict=True))

    def _check_crops(self, pixel_values: Tensor, layouts: list[tuple[Grid, Grid]], needed: list[int]) -> None:
        """Raises PromptError where an image has another number of crops than its size asks for."""
        if pixel_values.device.type == "meta" or isinstance(pixel_values, FakeTensor):  # shapes without contents
            return
        max_crops = pixel_values.shape[1]
        # Crops are padded with zeros to the most crops of the batch; a crop of an image is never all zeros, but for
        # black ones that are not normalised, where no value is negative.
        lowest, highest = torch.stack(torch.aminmax(pixel_values.flatten(2), dim=2)).tolist()
        may_be_black = all(value >= 0 for own in lowest for value in own)
        filled = [[ends != (0, 0) for ends in zip(*own, strict=True)] for own in zip(lowest, highest, strict=True)]
        for number, (count, (size, grid)) in enumerate(zip(needed, layouts, strict=True)):
            given = max((crop + 1 for crop in range(max_crops) if filled[number][crop]), default=min(count, max_crops))
            if may_be_black:
                given = max(given, min(count, max_crops))
            if given != count:
                tiles = f"a base crop and {grid[0]} x {grid[1]} tiles" if count > 1 else "it has no tiles"
                raise PromptError(
                    f"Image {number} has {given} crops in pixel_values {tuple(pixel_values.shape)}, but its size"
                    f" {size[0]} x {size[1]} (height x width) asks for {count}: {tiles}. Give the"
                    " pixel_values, image_sizes and tile_grids of the same images."
                )

    def _stitched(self, grid: Grid) -> Grid:
        """(rows, cols) of patches of all tiles together."""
        return grid[0] * self.geometry.grid[0], grid[1] * self.geometry.grid[1]

    def _shown_cells(self, size: Grid, grid: Grid) -> tuple[range, range]:
        """Rows and columns of stitched patches that show some of the image, and not padding alone."""
        side, (tile_rows, tile_cols) = self.geometry.image_size, self.geometry.grid
        top, left, height, width = placement(*size, grid[0] * side, grid[1] * side)
        patch_height, patch_width = side // tile_rows, side // tile_cols
        rows = range(top // patch_height, math.ceil((top + height) / patch_height))
        return rows, range(left // patch_width, math.ceil((left + width) / patch_width))

    def _newline_rows(self, size: Grid, grid: Grid) -> range:
        """Stitched rows after which ``row_newline`` puts a newline token."""
        if not self.options.row_newline:
            return range(0)
        return self._shown_cells(size, grid)[0] if self.options.drop_padding else range(self._stitched(grid)[0])

    def _interleave(self, tiles: Tensor, kept: Tensor, size: Grid, grid: Grid, newline: Tensor) -> Tensor:
        """Compressed tiles ``[T, K, d]`` in reading order; ``kept [T, num_kept]`` are rows of the tower."""
        newline_rows = self._newline_rows(size, grid)
        keys = self._reading_order(kept, tiles.shape[1] - kept.shape[1], grid)
        tokens = tiles.flatten(0, 1)
        if newline_rows:
            line = self._stitched(grid)[1] + 1
            ends = torch.arange(newline_rows.start + 1, newline_rows.stop + 1, device=keys.device) * line - 1
            keys, tokens = torch.cat([keys, ends]), torch.cat([tokens, newline.expand(len(newline_rows), -1)])
        return tokens[keys.argsort().to(tokens.device)]

    def _reading_order(self, kept: Tensor, num_contextual: int, grid: Grid) -> Tensor:
        """Sort keys of tiles' tokens, all distinct: int64 ``[T * (num_kept + num_contextual)]``.

        The published order: kept patches line by line over all tiles together (a line runs through every tile of its
        row), then the CLS tokens of all tiles, then their contextual tokens, tile by tile. A line has one key more
        than it has patches, where a newline token fits.
        """
        num_tiles, (tile_rows, tile_cols) = len(kept), self.geometry.grid
        tile = torch.arange(num_tiles, device=kept.device).unsqueeze(1)
        patch = kept - int(self.geometry.has_cls)
        y = tile // grid[1] * tile_rows + patch // tile_cols
        x = tile % grid[1] * tile_cols + patch % tile_cols
        height, line = self._stitched(grid)[0], self._stitched(grid)[1] + 1
        after_patches = height * line
        of_kept = torch.where(patch < 0, after_patches + tile, y * line + x)
        number = torch.arange(num_contextual, device=kept.device)
        of_contextual = after_patches + num_tiles + tile * num_contextual + number
        return torch.cat([of_kept, of_contextual], dim=1).flatten()


def unpadded(size: Grid, num_rows: int, num_cols: int) -> tuple[range, range]:
    """Rows and columns of stitched patches that the unmodified model uses; Hugging Face's arithmetic in patches.

    Args:
        size: original (height, width) of the image.
        num_rows, num_cols: stitched patches.
    """
    height, width = size
    if width / height > num_cols / num_rows:
        padding = (num_rows - int(round(height * (num_cols / width), 7))) // 2
        return range(padding, num_rows - padding), range(num_cols)
    padding = (num_cols - int(round(width * (num_rows / height), 7))) // 2
    return range(num_rows), range(padding, num_cols - padding)


def _pairs(tensor: Tensor, num_images: int, name: str, what: str) -> list[Grid]:
    """A tensor ``[images, 2]`` of positive numbers as pairs on the host; PromptError for anything else."""
    if tuple(tensor.shape) != (num_images, 2):
        raise PromptError(
            f"{name} has shape {tuple(tensor.shape)} for {num_images} images: must be ({num_images}, 2), the {what}"
            " of each image."
        )
    pairs = [(int(first), int(second)) for first, second in tensor.tolist()]
    if any(first < 1 or second < 1 for first, second in pairs):
        raise PromptError(f"{name}={pairs}: each must be at least 1 ({what}).")
    return pairs
