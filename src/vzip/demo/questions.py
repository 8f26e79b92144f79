"""What can be asked about a scene: the benchmark's four tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vzip.demo.scenes import COLORS, MAX_OBJECTS, SHAPES, Scene, Thing, choose

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")
TASKS = ("existence", "attributes", "counting", "reading")


@dataclass(frozen=True)
class Question:
    """A question about a scene; `kind` is the sub-type within the `task`."""

    task: str
    kind: str
    text: str
    answer: str


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
    """The things that clearly stand in one quarter of the image, with its name."""
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


def tuning_questions(scene: Scene, rng: np.random.RandomState, count: int) -> list[Question]:
    """Up to `count` questions in the benchmark's forms, for a model that has to get used to fewer visual tokens.

    One of existence, which suffers least, what the sign says, two pairs of counting, which suffers most, and as many of
    attributes as make seven; then what the sign says twice more, since of reading most is left to win.
    """
    pairs = counting_pairs(scene, rng)
    chosen = [choose(rng, existence_questions(scene, rng)), *reading_questions(scene)]
    chosen += [question for number in rng.permutation(len(pairs))[:2] for question in pairs[number]]
    return ((chosen + attribute_questions(scene, rng))[:7] + 2 * reading_questions(scene))[:count]
