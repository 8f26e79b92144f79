"""Draws scenes.

Only integer arithmetic, comparisons of exactly represented floats and Pillow's fixed-point resize are used, no
transcendental functions and no font rasteriser: the bytes are the same on every machine.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import resources

import numpy as np
from PIL import Image

from vzip.demo.scenes import COLORS, LETTER_PITCH, SHAPES, SIGN_HEIGHT, SIGN_MARGIN, Scene

CELL = 64  # pixels of the atlas (scripts/tiny/make_glyphs.py): a column a character, a row a font
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
# Outward normals of a regular pentagon standing on an edge (sin, cos of 36 + 72 k degrees), rounded once and for all.
PENTAGON = ((0.0, 1.0), (0.9511, 0.3090), (0.5878, -0.8090), (-0.5878, -0.8090), (-0.9511, 0.3090))
SUPERSAMPLE = 3


@cache
def glyph(font: int, character: str) -> Image.Image:
    """One character of the atlas, cropped to its own width; the height keeps the common baseline."""
    with resources.files("vzip.demo").joinpath("glyphs.png").open("rb") as file:
        atlas = Image.open(file).convert("L")
    column = CHARACTERS.index(character)
    cell = atlas.crop((column * CELL, font * CELL, (column + 1) * CELL, (font + 1) * CELL))
    left, _, right, _ = cell.getbbox() or (0, 0, CELL, CELL)
    return cell.crop((left, 6, right, 62))


CAP_HEIGHT = 41  # of the atlas's capitals, pixels


@lru_cache(maxsize=4096)
def text_mask(text: str, font: int, cap_height: int) -> np.ndarray:
    """Coverage [SIGN_HEIGHT, LETTER_PITCH * letters] of the word, uint8: one letter a cell, wide ones condensed."""
    scale = cap_height / CAP_HEIGHT
    strip = Image.new("L", (LETTER_PITCH * len(text), SIGN_HEIGHT))
    for number, character in enumerate(text):
        drawn = glyph(font, character)
        size = (max(1, min(LETTER_PITCH - 1, round(drawn.width * scale))), round(drawn.height * scale))
        left = number * LETTER_PITCH + (LETTER_PITCH - size[0]) // 2
        strip.paste(drawn.resize(size, Image.Resampling.BOX), (left, (SIGN_HEIGHT - size[1]) // 2))
    return np.asarray(strip)


@lru_cache(maxsize=1024)
def shape_mask(shape: str, edge: int) -> np.ndarray:
    """Coverage [edge, edge] of a shape in its bounding square, from 0 to SUPERSAMPLE**2."""
    n = edge * SUPERSAMPLE
    u = (2 * np.arange(n) + 1 - n) / n
    x, y = u[None, :], u[:, None]
    inside: np.ndarray
    if shape == "circle":
        inside = x * x + y * y <= 0.96
    elif shape == "square":
        inside = (abs(x) <= 0.86) & (abs(y) <= 0.86)
    elif shape == "triangle":
        inside = (y <= 0.9) & (y + 1.9 * x >= -0.95) & (y - 1.9 * x >= -0.95)
    elif shape == "diamond":
        inside = abs(x) + abs(y) <= 0.98
    elif shape == "cross":
        inside = ((abs(x) <= 0.32) | (abs(y) <= 0.32)) & (abs(x) <= 0.92) & (abs(y) <= 0.92)
    elif shape == "star":  # a pentagram: the points that at most one of the five edges' lines leaves outside
        inside = np.sum([nx * x + ny * (y - 0.06) <= 0.34 for nx, ny in PENTAGON], axis=0) >= 4
        inside &= x * x + (y - 0.06) * (y - 0.06) <= 1.2
    else:
        raise ValueError(f"shape '{shape}' is not one of {SHAPES}")
    inside = np.broadcast_to(inside, (n, n))
    return inside.reshape(edge, SUPERSAMPLE, edge, SUPERSAMPLE).sum(axis=(1, 3)).astype(np.int32)


def background(rng: np.random.RandomState, size: int) -> np.ndarray:
    """A muted texture [size, size, 3], int32: clouds, stripes, tiles or a gradient between two tones, with grain."""
    base = rng.randint(70, 190)
    tones = np.clip(base + rng.randint(-45, 46, size=(2, 1)) + rng.randint(-22, 23, size=(2, 3)), 30, 225)
    kind = rng.randint(4)
    y, x = np.mgrid[0:size, 0:size]
    if kind == 0:
        coarse = rng.randint(0, 256, size=(6, 6)).astype(np.uint8)
        fine = rng.randint(0, 256, size=(24, 24)).astype(np.uint8)
        up = [np.asarray(Image.fromarray(a).resize((size, size), Image.Resampling.BICUBIC)) for a in (coarse, fine)]
        field = (2 * up[0].astype(np.int32) + up[1]) // 3
    elif kind == 1:
        a, b, period = rng.randint(-3, 4), rng.randint(1, 4), rng.randint(24, 90)
        phase = (a * x + b * y) % period
        field = 255 * np.minimum(phase, period - phase) // (period // 2)
    elif kind == 2:
        period, shift = rng.randint(18, 56), rng.randint(0, 3)
        tile = (x + (y // period) * period * shift // 2) // period + y // period
        field = np.where(tile % 2 == 0, 40, 215) + rng.randint(-20, 21, size=(64,))[(tile * 7 + y // period) % 64]
    else:
        field = 255 * (x * rng.randint(0, 4) + y * rng.randint(1, 4)) // (size * 7)
    field = np.clip(field, 0, 255)[..., None]
    mixed = (tones[0] * (255 - field) + tones[1] * field) // 255
    return mixed + rng.randint(-9, 10, size=(size, size, 1))


def blend(canvas: np.ndarray, left: int, top: int, mask: np.ndarray, full: int, color: np.ndarray) -> None:
    region = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    region += (color - region) * mask[..., None] // full


def render(scene: Scene) -> Image.Image:
    """Draws the scene: an RGB image of `scene.canvas` pixels a side."""
    rng = np.random.RandomState(scene.seed ^ 0x5EED)
    canvas = background(rng, scene.canvas)
    for thing in scene.things:
        color = np.clip(np.array(COLORS[thing.color]) + rng.randint(-14, 15, size=3), 0, 255)
        rim = np.array((235,) * 3 if sum(color) < 200 else (25,) * 3)
        mask = shape_mask(thing.shape, thing.edge)
        blend(canvas, thing.left, thing.top, mask, SUPERSAMPLE**2, rim)
        inner = shape_mask(thing.shape, thing.edge - 4)
        blend(canvas, thing.left + 2, thing.top + 2, inner, SUPERSAMPLE**2, color)
    if scene.sign:
        sign = scene.sign
        light, dark = rng.randint(205, 250, size=3), rng.randint(10, 70, size=3)
        plate, ink = (dark, light) if sign.dark else (light, dark)
        canvas[sign.top : sign.top + sign.height, sign.left : sign.left + sign.width] = plate
        mask = text_mask(sign.text, sign.font, sign.cap_height).astype(int)
        blend(canvas, sign.left + SIGN_MARGIN, sign.top, mask, 255, ink)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
