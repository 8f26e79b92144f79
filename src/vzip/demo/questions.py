"""What can be asked about a scene: the benchmark's four tasks and the questions used in training only."""

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


def placing_questions(scene: Scene, rng: np.random.RandomState, count: int) -> list[Question]:
    """Up to `count` different questions, most of them about where things are and how many.

    Whether something is there and what a property is are learned first; relations, positions and counts, which need a
    thing's place beside its name, only from questions that ask for little else.
    """
    related = [q for _ in range(4) for q in attribute_questions(scene, rng)]
    related += [q for _ in range(8) for q in attribute_questions(scene, rng) if q.kind == "relation"]
    exists = existence_questions(scene, rng) + combined_existence_questions(scene, rng) + absent_questions(scene, rng)
    places = [Question("counting", "open", f"Where is the {t.name}?", place) for t, place in placed_things(scene)]
    counts = [q for _ in range(2) for pair in counting_pairs(scene, rng) for q in pair] + open_questions(scene, rng)[:1]
    pool = list(dict.fromkeys([*exists, *places, *counts, *related]))
    chosen = [pool[i] for i in rng.permutation(len(pool))[: count - len(reading_questions(scene))]]
    chosen += reading_questions(scene)
    return [chosen[i] for i in rng.permutation(len(chosen))]


def tuning_questions(scene: Scene, rng: np.random.RandomState, count: int) -> list[Question]:
    """Up to `count` questions in the benchmark's forms, for a model that has to get used to fewer visual tokens.

    One of existence, which suffers least, what the sign says, two pairs of counting, which suffers most, and as many of
    attributes as there is room for.
    """
    pairs = counting_pairs(scene, rng)
    chosen = [choose(rng, existence_questions(scene, rng)), *reading_questions(scene)]
    chosen += [question for number in rng.permutation(len(pairs))[:2] for question in pairs[number]]
    return (chosen + attribute_questions(scene, rng))[:count]
