"""Generated images: what is in a scene.

A scene is a list of coloured shapes and at most one sign with a word or a number, on a textured background.
Everything is drawn from `numpy.random.RandomState`, whose stream NumPy has frozen: a seed means the same scene on every
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "green": (30, 160, 60),
    "blue": (36, 70, 220),
    "yellow": (240, 220, 40),
    "purple": (140, 40, 170),
    "orange": (245, 130, 20),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
# Things stand on a grid of 14 pixels, the tower's patches, and letters are one patch wide, which makes the benchmark
# easy to see: at arbitrary offsets the built-in tower named 17 % of the letters after 25,600 images, on the grid
# 99 % after 22,400 (batch size, rate and letter spacing differed too).
GRID = 14
SIZES = {"small": 2, "large": 4}  # edge of the bounding square in grid cells; up to SLACK pixels are left free
SLACK = 4
LETTER_PITCH, SIGN_HEIGHT, SIGN_MARGIN = GRID, 2 * GRID, 4  # pixels
_WORDS = """
STOP EXIT OPEN SALE CAFE HOTEL BANK TAXI POLICE PARK BUS TRAIN SHOP BAR GYM ZOO MILK BREAD TEA SODA PIZZA FISH NORTH
SOUTH EAST WEST PUSH PULL SLOW FAST UP DOWN IN OUT LEFT RIGHT ONE WAY KEY LOCK FIRE WATER AIR GAS OIL BOOK MUSIC
FILM GAME ART SUN MOON RAIN SNOW WIND DOG CAT BIRD HORSE LION
"""
WORDS = tuple(_WORDS.split())
MAX_OBJECTS = 4

# RandomState takes seeds below 2**32; the ranges below can never meet.
TRAIN_SEEDS = (0, 2_000_000_000)
TEST_SEEDS = (3_000_000_000, 4_000_000_000)


@dataclass(frozen=True)
class Thing:
    """One shape: `left` and `top` of its bounding square of `edge` pixels."""

    shape: str
    color: str
    size: str
    left: int
    top: int
    edge: int

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.edge / 2, self.top + self.edge / 2

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A plate with one word or number, `cap_height` pixels high, at `left`, `top` and of `width` x `height` pixels."""

    text: str
    font: int
    cap_height: int
    left: int
    top: int
    width: int
    height: int
    dark: bool


@dataclass(frozen=True)
class Scene:
    """What an image of `canvas` x `canvas` pixels shows; `seed` also fixes its background and colour noise."""

    seed: int
    canvas: int
    things: tuple[Thing, ...]
    sign: Sign | None

    def quarter(self, thing: Thing) -> str | None:
        """Returns "top left" ..., or None when the thing is too near a middle line to tell."""
        middle, margin = self.canvas / 2, self.canvas / 16
        x, y = thing.center
        if abs(x - middle) < margin or abs(y - middle) < margin:
            return None
        return f"{'top' if y < middle else 'bottom'} {'left' if x < middle else 'right'}"


def choose(rng: np.random.RandomState, options: Sequence[T]) -> T:
    return options[rng.randint(len(options))]


def sample_scene(seed: int, canvas: int = 336) -> Scene:
    """Draws a scene: one to four shapes that do not touch, and a sign in three images of four."""
    rng = np.random.RandomState(seed)
    cells = canvas // GRID
    taken = np.zeros((cells + 1, cells + 1), dtype=bool)  # a row and a column more: neighbours keep a cell apart

    def place(columns: int, rows: int) -> tuple[int, int] | None:
        """Left and top, in pixels, of a free block of cells."""
        for _ in range(40 if columns < cells and rows < cells else 0):
            x, y = int(rng.randint(cells - columns + 1)), int(rng.randint(cells - rows + 1))
            if not taken[y : y + rows + 1, x : x + columns + 1].any():
                taken[max(0, y - 1) : y + rows + 1, max(0, x - 1) : x + columns + 1] = True
                return x * GRID, y * GRID
        return None

    sign = None
    if rng.randint(4):
        text = choose(rng, WORDS) if rng.randint(5) < 3 else str(rng.randint(10, 100))
        cap_height, font = int(rng.randint(15, 19)), int(rng.randint(5))
        spot = place(len(text) + 2, SIGN_HEIGHT // GRID)  # a free cell on either side holds the plate's margin
        if spot:
            width = len(text) * LETTER_PITCH + 2 * SIGN_MARGIN
            left = spot[0] + GRID - SIGN_MARGIN
            sign = Sign(text, font, cap_height, left, spot[1], width, SIGN_HEIGHT, bool(rng.randint(2)))
    things: list[Thing] = []
    repeated = rng.randint(3) == 0  # every third image repeats a shape, so that counting one kind means something
    for _ in range(1 + rng.randint(MAX_OBJECTS)):
        shape = things[0].shape if repeated and things and rng.randint(2) else choose(rng, SHAPES)
        color, size = choose(rng, tuple(COLORS)), choose(rng, tuple(SIZES))
        slack = int(rng.randint(SLACK + 1))
        spot = place(SIZES[size], SIZES[size])
        if spot and not any(t.shape == shape and t.color == color for t in things):
            edge = SIZES[size] * GRID - slack
            things.append(Thing(shape, color, size, spot[0] + slack // 2, spot[1] + slack // 2, edge))
    return Scene(seed, canvas, tuple(things), sign)
