"""Which patches a compressor kept and which it merged, drawn over the image."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vzip.compressors.base import CompressedTokens

KEPT_COLOR = (255, 210, 0)
DIMMED = 0.28  # brightness left to what was not kept


def group_colors(count: int) -> np.ndarray:
    """`count` colours [count, 3], uint8, neighbours in index far apart in hue."""
    hues = (np.arange(count) * 0.61803398875) % 1.0
    rgb = [Image.new("HSV", (1, 1), (int(255 * h), 190, 235)).convert("RGB").getpixel((0, 0)) for h in hues]
    return np.array(rgb, dtype=np.uint8).reshape(count, 3)


def with_text(image: Image.Image, title: str, below: str) -> Image.Image:
    """An image with a line of text above it and lines below it, broken to its width."""
    font, margin = ImageFont.load_default(15), 6
    pen = ImageDraw.Draw(image)

    def broken(text: str) -> str:
        lines: list[str] = []
        for word in (word for line in text.splitlines() for word in [None, *line.split()]):
            if word is None:
                lines.append("")
            elif pen.textlength(f"{lines[-1]} {word}", font) <= image.width - 2 * margin or not lines[-1]:
                lines[-1] = f"{lines[-1]} {word}".strip()
            else:
                lines.append(word)
        return "\n".join(lines)

    texts = [broken(title), broken(below)]
    heights = [int(pen.multiline_textbbox((0, 0), text, font)[3]) + 2 * margin for text in texts]
    sheet = Image.new("RGB", (image.width, image.height + sum(heights)), "white")
    sheet.paste(image, (0, heights[0]))
    pen = ImageDraw.Draw(sheet)
    for text, top in zip(texts, (0, heights[0] + image.height), strict=True):
        pen.multiline_text((margin, top + margin), text, "black", font)
    return sheet


def draw_overlay(
    image: Image.Image, tokens: CompressedTokens, row: int, grid: tuple[int, int], has_cls: bool
) -> Image.Image:
    """Draws one crop as two panels side by side: kept patches bright and framed; merge groups, one colour each.

    Args:
        image: the crop as the vision tower saw it, a square RGB image.
        tokens: what the compressor returned for a batch.
        row: which crop of the batch.
        grid: (rows, cols) of patches.
        has_cls: whether row 0 of `tokens`' indices means the CLS token, which has no place in the image.

    Returns:
        An RGB image, twice as wide as `image` plus a gap of 8 pixels.
    """
    first, num_patches = int(has_cls), grid[0] * grid[1]
    kept = np.zeros(num_patches, dtype=bool)
    source = tokens.source_index[row].cpu().numpy() - first
    kept[source[source >= 0]] = True
    groups = tokens.merge_index[row].cpu().numpy()[first:].reshape(grid)
    kept = kept.reshape(grid)
    cell_w, cell_h = image.width / grid[1], image.height / grid[0]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)

    def spread(cells: np.ndarray) -> np.ndarray:
        """[rows, cols] -> one value a pixel."""
        ys = np.minimum((np.arange(image.height) / cell_h).astype(int), grid[0] - 1)
        xs = np.minimum((np.arange(image.width) / cell_w).astype(int), grid[1] - 1)
        return cells[ys[:, None], xs[None, :]]

    left = Image.fromarray((pixels * np.where(spread(kept), 1.0, DIMMED)[..., None]).astype(np.uint8))
    pen = ImageDraw.Draw(left)
    for y, x in zip(*np.nonzero(kept), strict=True):
        pen.rectangle((x * cell_w, y * cell_h, (x + 1) * cell_w - 1, (y + 1) * cell_h - 1), outline=KEPT_COLOR)
    colors = group_colors(max(1, int(groups.max()) + 1))
    tint = colors[np.maximum(groups, 0)].astype(np.float32)
    merged = spread(groups >= 0)[..., None]
    right = Image.fromarray(np.where(merged, 0.45 * pixels + 0.55 * spread(tint), pixels).astype(np.uint8))
    sheet = Image.new("RGB", (2 * image.width + 8, image.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (image.width + 8, 0))
    return sheet
