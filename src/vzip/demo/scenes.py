"""Generated pictures: what is in a scene, and what can be asked about it.

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
# easy to see: at arbitrary offsets the built-in tower named 17 % of the letters after 25,600 pictures, on the grid
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
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")
TASKS = ("existence", "attributes", "counting", "reading")
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
    """What a picture of `canvas` x `canvas` pixels shows; `seed` also fixes its background and colour noise."""

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

    def caption(self) -> str:
        """One sentence that names everything in the scene."""
        parts = []
        for thing in self.things:
            place = self.quarter(thing)
            parts.append(f"a {thing.size} {thing.name}" + (f" at the {place}" if place else ""))
        if self.sign:
            parts.append(f"a sign that says {self.sign.text.lower()}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Question:
    """A question about a scene; `kind` is the sub-type within the `task`."""

    task: str
    kind: str
    text: str
    answer: str


def choose(rng: np.random.RandomState, options: Sequence[T]) -> T:
    return options[rng.randint(len(options))]


def sample_scene(seed: int, canvas: int = 336) -> Scene:
    """Draws a scene: one to four shapes that do not touch, and a sign in three pictures of four."""
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
    repeated = rng.randint(3) == 0  # every third picture repeats a shape, so that counting one kind means something
    for _ in range(1 + rng.randint(MAX_OBJECTS)):
        shape = things[0].shape if repeated and things and rng.randint(2) else choose(rng, SHAPES)
        color, size = choose(rng, tuple(COLORS)), choose(rng, tuple(SIZES))
        slack = int(rng.randint(SLACK + 1))
        spot = place(SIZES[size], SIZES[size])
        if spot and not any(t.shape == shape and t.color == color for t in things):
            edge = SIZES[size] * GRID - slack
            things.append(Thing(shape, color, size, spot[0] + slack // 2, spot[1] + slack // 2, edge))
    return Scene(seed, canvas, tuple(things), sign)


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def existence_questions(scene: Scene, rng: np.random.RandomState) -> list[Question]:
    """A question to be answered yes and one to be answered no, both on a shape or both on a colour."""
    every: tuple[str, ...]
    if rng.randint(2):
        kind, there, every, ask = "shape", {t.shape for t in scene.things}, SHAPES, "Is there {} in the picture?"
    else:
        kind, there, every = "color", {t.color for t in scene.things}, tuple(COLORS)
        ask = "Is there {} object in the picture?"
    present, absent = sorted(there), [name for name in every if name not in there]
    yes = [Question("existence", kind, ask.format(article(choose(rng, present))), "yes")] if present else []
    return [*yes, Question("existence", kind, ask.format(article(choose(rng, absent))), "no")]


def combined_existence_questions(scene: Scene, rng: np.random.RandomState) -> list[Question]:
    """Yes/no on a colour and a shape together, used in training only; many of the no-questions mix what is there."""
    present = [t.name for t in scene.things]
    mixed = [f"{a.color} {b.shape}" for a in scene.things for b in scene.things]
    mixed = [name for name in mixed if name not in present]
    near = [f"{t.color} {s}" for t in scene.things for s in SHAPES if f"{t.color} {s}" not in present]
    near += [f"{c} {t.shape}" for t in scene.things for c in COLORS if f"{c} {t.shape}" not in present]
    far = [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in present]
    hard, easy = mixed or near or far, near or far
    absent = choose(rng, hard if rng.randint(2) else (easy if rng.randint(2) else far))
    ask = "Is there {} in the picture?".format
    return [
        *([Question("existence", "combined", ask(article(choose(rng, present))), "yes")] if present else []),
        Question("existence", "combined", ask(article(absent)), "no"),
    ]


def attribute_questions(scene: Scene, rng: np.random.RandomState) -> list[Question]:
    """Colour, shape and size of a thing that one property singles out, and relations between two things."""
    found = []
    shapes, colors = [t.shape for t in scene.things], [t.color for t in scene.things]
    for t in scene.things:
        if shapes.count(t.shape) == 1:
            found.append(Question("attributes", "color", f"What color is the {t.shape}?", t.color))
            found.append(Question("attributes", "size", f"Is the {t.shape} small or large?", t.size))
        if colors.count(t.color) == 1:
            found.append(Question("attributes", "shape", f"What shape is the {t.color} object?", t.shape))
    for a in scene.things:
        for b in scene.things:
            dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
            far = scene.canvas / 8
            if a is not b and abs(dx) > far:
                text = f"Is the {a.name} to the left or to the right of the {b.name}?"
                found.append(Question("attributes", "relation", text, "left" if dx < 0 else "right"))
            if a is not b and abs(dy) > far:
                text = f"Is the {a.name} above or below the {b.name}?"
                found.append(Question("attributes", "relation", text, "above" if dy < 0 else "below"))
    kinds = sorted({q.kind for q in found})
    rng.shuffle(kinds)
    return [choose(rng, [q for q in found if q.kind == kind]) for kind in kinds]


def placed_things(scene: Scene) -> list[tuple[Thing, str]]:
    """The things that clearly stand in one quarter of the picture, with its name."""
    return [(thing, place) for thing in scene.things if (place := scene.quarter(thing))]


def counting_pairs(scene: Scene, rng: np.random.RandomState) -> list[tuple[Question, Question]]:
    """MME's form: the same question once with the right and once with a wrong value, to be answered yes and no."""

    def pair(kind: str, text: str, right: str, wrong: str) -> tuple[Question, Question]:
        return (
            Question("counting", kind, text.format(right), "yes"),
            Question("counting", kind, text.format(wrong), "no"),
        )

    def off_by_one(count: int, low: int, high: int) -> int:
        return int(choose(rng, [n for n in (count - 1, count + 1) if low <= n <= high]))

    pairs = []
    total = len(scene.things)
    if total:
        text, wrong = "Is the number of objects in the picture {}?", off_by_one(total, 1, MAX_OBJECTS)
        pairs.append(pair("count", text, NUMBER_WORDS[total], NUMBER_WORDS[wrong]))
        shape = choose(rng, scene.things).shape
        count = sum(t.shape == shape for t in scene.things)
        text, wrong = f"Is the number of {shape} shapes {{}}?", off_by_one(count, 1, MAX_OBJECTS)
        pairs.append(pair("count_shape", text, NUMBER_WORDS[count], NUMBER_WORDS[wrong]))
    placed = placed_things(scene)
    if placed:
        thing, place = choose(rng, placed)
        others = [f"{v} {h}" for v in ("top", "bottom") for h in ("left", "right") if f"{v} {h}" != place]
        pairs.append(pair("position", f"Is the {thing.name} in the {{}} of the picture?", place, choose(rng, others)))
    return pairs


def reading_questions(scene: Scene) -> list[Question]:
    """What the sign says."""
    if scene.sign is None:
        return []
    kind = "number" if scene.sign.text.isdigit() else "word"
    return [Question("reading", kind, f"What {kind} is written on the sign?", scene.sign.text.lower())]


def open_questions(scene: Scene, rng: np.random.RandomState) -> list[Question]:
    """Open forms of counting and position, used in training only."""
    found = [Question("counting", "open", "How many objects are in the picture?", NUMBER_WORDS[len(scene.things)])]
    placed = placed_things(scene)
    if placed:
        thing, place = choose(rng, placed)
        found.append(Question("counting", "open", f"Where is the {thing.name}?", place))
    return found


def training_questions(scene: Scene, rng: np.random.RandomState, count: int) -> list[Question]:
    """Up to `count` questions of all kinds in random order."""
    pool = combined_existence_questions(scene, rng) + attribute_questions(scene, rng)[:3] + open_questions(scene, rng)
    for pair in counting_pairs(scene, rng):
        pool.append(pair[rng.randint(2)])
    order = rng.permutation(len(pool))[: count - 1 if scene.sign else count]
    chosen = [pool[i] for i in order] + reading_questions(scene)
    return [chosen[i] for i in rng.permutation(len(chosen))]


def absent_questions(scene: Scene, rng: np.random.RandomState) -> list[Question]:
    """Attribute questions about what is not there, answered "none"; used in training only.

    Looking a property up is learned early, saying that nothing matches late: this asks for the second where the model
    can already do the first.
    """
    shape = choose(rng, [s for s in SHAPES if s not in {t.shape for t in scene.things}])
    color = choose(rng, [c for c in COLORS if c not in {t.color for t in scene.things}])
    return [
        Question("attributes", "absent", f"What color is the {shape}?", "none"),
        Question("attributes", "absent", f"What shape is the {color} object?", "none"),
    ]


def many_questions(scene: Scene, rng: np.random.RandomState, count: int) -> list[Question]:
    """Up to `count` different questions, many of them about existence, the task that is learned last."""

    def even(asked: list[Question]) -> list[Question]:
        """The different ones of `asked`, about as many noes as yeses."""
        yes = list(dict.fromkeys(q for q in asked if q.answer == "yes"))
        return yes + list(dict.fromkeys(q for q in asked if q.answer == "no"))[: len(yes)]

    exists = even([q for _ in range(MAX_OBJECTS) for q in existence_questions(scene, rng)])
    exists += even([q for _ in range(3) for q in combined_existence_questions(scene, rng)])
    rest = [q for _ in range(2) for q in attribute_questions(scene, rng)]
    rest += [q for pair in counting_pairs(scene, rng) for q in pair] + open_questions(scene, rng)
    rest = list(dict.fromkeys(rest))
    sign = reading_questions(scene)
    room = max(0, count - len(exists) - len(sign))
    chosen = exists + sign + [rest[i] for i in rng.permutation(len(rest))[:room]]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def most_questions(scene: Scene, rng: np.random.RandomState, count: int) -> list[Question]:
    """`many_questions`, and two about what is not there."""
    chosen = many_questions(scene, rng, count - 2) + absent_questions(scene, rng)
    return [chosen[i] for i in rng.permutation(len(chosen))]
