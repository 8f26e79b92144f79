"""What the built-in model is asked in training: the benchmark's questions in other forms, and others beside them."""

from __future__ import annotations

import numpy as np

from vzip.demo.questions import (
    NUMBER_WORDS,
    Question,
    article,
    attribute_questions,
    counting_pairs,
    existence_questions,
    placed_things,
    reading_questions,
)
from vzip.demo.scenes import COLORS, MAX_OBJECTS, SHAPES, Scene, choose


def combined_existence_questions(scene: Scene, rng: np.random.RandomState) -> list[Question]:
    """Yes/no on a colour and a shape together; many of the no-questions mix what is there."""
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


def open_questions(scene: Scene, rng: np.random.RandomState) -> list[Question]:
    """Open forms of counting and position."""
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
    """Attribute questions about what is not there, answered "none".

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
