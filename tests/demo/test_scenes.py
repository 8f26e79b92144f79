"""Scenes: what an image shows, what is asked about it, and that both are the same everywhere."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from scripts.tiny.labels import patch_labels, sign_label, thing_label
from scripts.tiny.questions import many_questions, training_questions
from scripts.tiny.train import VALIDATION_SEEDS

from vzip.demo import benchmark, scoring
from vzip.demo.dialogues import scene_of
from vzip.demo.questions import (
    NUMBER_WORDS,
    TASKS,
    attribute_questions,
    counting_pairs,
    existence_questions,
    reading_questions,
    tuning_questions,
)
from vzip.demo.render import CHARACTERS, SUPERSAMPLE, render, shape_mask
from vzip.demo.scenes import (
    COLORS,
    GRID,
    SHAPES,
    SIGN_MARGIN,
    SIZES,
    SLACK,
    TEST_SEEDS,
    TRAIN_SEEDS,
    Scene,
    Sign,
    Thing,
    sample_scene,
)
from vzip.evaluation.benchmarks.protocols import PROTOCOLS

SEEDS = range(TEST_SEEDS[0], TEST_SEEDS[0] + 150)


def test_images_are_the_same_bytes_on_every_machine():
    digest = hashlib.sha256(
        b"".join(render(sample_scene(seed)).tobytes() for seed in range(TEST_SEEDS[0], TEST_SEEDS[0] + 6))
    )
    assert digest.hexdigest() == "61d9673cdd839e7b2a4705bdd4f83ec30a97c96ac3f3f0c378cbbc04a5f1d5e7"


def test_questions_are_the_same_on_every_machine():
    rows = benchmark.build_rows(benchmark.test_scenes())
    text = "".join(f"{r['id']}|{r['question']}|{r['answer']}|{r['image']}\n" for task in rows.values() for r in task)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "8247fcfb812c2d2d2f5b5754db600f492810a50c4b8c520c66466ba79103f15d"
    )
    assert {task: len(r) for task, r in rows.items()} == dict.fromkeys(rows, benchmark.QUESTIONS_PER_TASK)
    assert all(len({r["id"] for r in task}) == len(task) for task in rows.values())


def test_training_validation_and_benchmark_never_share_a_seed():
    ranges = sorted([TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS])
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert ranges[-1][1] < 2**32


@pytest.mark.parametrize("canvas", [168, 336])
def test_nothing_overlaps_or_leaves_the_canvas(canvas):
    for seed in SEEDS:
        scene = sample_scene(seed, canvas)
        boxes = [(t.left, t.top, t.left + t.edge, t.top + t.edge) for t in scene.things]
        if scene.sign:
            s = scene.sign
            boxes.append((s.left, s.top, s.left + s.width, s.top + s.height))
        taken = np.zeros((canvas, canvas), dtype=int)
        for left, top, right, bottom in boxes:
            assert left >= 0 and top >= 0 and right <= canvas and bottom <= canvas
            taken[top:bottom, left:right] += 1
        assert taken.max(initial=0) <= 1


def test_answers_agree_with_the_scene():
    """Every kind of question, re-answered from the scene by a parser that shares no code with the generator."""
    kinds = set()
    for seed in SEEDS:
        scene = sample_scene(seed)
        rng = np.random.RandomState(seed % 1000)
        asked = existence_questions(scene, rng) + attribute_questions(scene, rng)
        asked += [q for pair in counting_pairs(scene, rng) for q in pair] + training_questions(scene, rng, 8)
        asked += many_questions(scene, rng, 20)
        for question in asked:
            kinds.add((question.task, question.kind))
            assert answer(scene, question.text) == question.answer, (question, scene)
    assert {k for _, k in kinds} == {
        *(
            "combined",
            "color",
            "shape",
            "size",
            "relation",
            "count",
            "count_shape",
            "position",
            "word",
            "number",
            "open",
        )
    }


def answer(scene: Scene, text: str) -> str:
    words = text.rstrip("?").split()
    by_name = {(t.color, t.shape): t for t in scene.things}

    def yes(condition: bool) -> str:
        return "yes" if condition else "no"

    def quarter(t: Thing) -> tuple[str, str]:
        x, y = t.left + t.edge / 2, t.top + t.edge / 2
        return ("top" if y < scene.canvas / 2 else "bottom", "left" if x < scene.canvas / 2 else "right")

    if text.startswith("Is there a"):
        name = words[3 : words.index("in")] if "in" in words else words[3:]
        if len(name) == 1:
            return yes(any(t.shape == name[0] for t in scene.things))
        if name[1] == "object":
            return yes(any(t.color == name[0] for t in scene.things))
        return yes((name[0], name[1]) in by_name)
    if text.startswith("What color"):
        (thing,) = [t for t in scene.things if t.shape == words[-1]]
        return thing.color
    if text.startswith("What shape"):
        (thing,) = [t for t in scene.things if t.color == words[4]]
        return thing.shape
    if text.endswith("small or large?"):
        (thing,) = [t for t in scene.things if t.shape == words[2]]
        return "small" if thing.edge <= 32 else "large"
    if "to the left or to the right" in text:
        a, b = by_name[words[2], words[3]], by_name[words[-2], words[-1]]
        return "left" if a.left + a.edge / 2 < b.left + b.edge / 2 else "right"
    if "above or below" in text:
        a, b = by_name[words[2], words[3]], by_name[words[-2], words[-1]]
        return "above" if a.top + a.edge / 2 < b.top + b.edge / 2 else "below"
    if text.startswith("Is the number of objects"):
        return yes(NUMBER_WORDS[len(scene.things)] == words[-1])
    if text.startswith("Is the number of"):
        return yes(NUMBER_WORDS[sum(t.shape == words[4] for t in scene.things)] == words[-1])
    if text.startswith("How many objects"):
        return NUMBER_WORDS[len(scene.things)]
    if text.startswith("Where is"):
        return " ".join(quarter(by_name[words[-2], words[-1]]))
    if "in the top" in text or "in the bottom" in text:
        return yes(quarter(by_name[words[2], words[3]]) == (words[6], words[7]))
    assert text.startswith("What word") or text.startswith("What number")
    assert scene.sign is not None
    return scene.sign.text.lower()


def test_half_of_the_existence_answers_and_all_counting_twins_are_balanced():
    rows = benchmark.build_rows(benchmark.test_scenes())
    assert sum(r["answer"] == "yes" for r in rows["existence"]) == 200
    twins: dict[str, list[str]] = {}
    for r in rows["counting"]:
        twins.setdefault(r["pair"], []).append(r["answer"])
    assert all(sorted(t) == ["no", "yes"] for t in twins.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_a_sensible_part_of_their_square(shape):
    mask = shape_mask(shape, 40)
    assert mask.shape == (40, 40) and mask.min() == 0 and mask.max() == SUPERSAMPLE**2
    assert 0.25 < mask.mean() / SUPERSAMPLE**2 < 0.8
    assert (mask == mask[:, ::-1]).all()  # all are symmetric left to right
    assert len({shape_mask(s, 40).tobytes() for s in SHAPES}) == len(SHAPES)


def test_colors_and_sign_are_where_the_scene_says():
    thing = Thing("square", "red", "large", 100, 200, 50)
    sign = Sign("STOP", 1, 18, left=24, top=28, width=64, height=28, dark=False)
    scene = Scene(7, 336, (thing,), sign)
    pixels = np.asarray(render(scene)).astype(int)
    assert abs(pixels[225, 125] - np.array(COLORS["red"])).max() <= 14
    assert pixels[29, 25].min() >= 205  # the plate's corner
    assert pixels[28:56, 28:84].min() <= 70  # ink
    labels, characters = patch_labels(scene)
    assert labels[225 // 14, 125 // 14] == thing_label(thing)
    assert (labels[2:4, 2:6] == sign_label(sign)).all()
    assert labels[0, 0] == 0 and characters[0, 0] == 0
    assert [CHARACTERS[c - 1] for c in characters[2] if c] == list("STOP")
    assert (characters[2] == characters[3]).all()


def test_every_letter_and_thing_stands_on_the_patch_grid():
    for seed in SEEDS:
        scene = sample_scene(seed)
        for thing in scene.things:
            cells = SIZES[thing.size] * GRID
            assert 0 <= thing.left % GRID <= (cells - thing.edge) and cells - thing.edge <= SLACK
        if scene.sign:
            assert (scene.sign.left + SIGN_MARGIN) % GRID == 0 and scene.sign.top % GRID == 0


def test_scores_known_by_hand():
    def rows(*said):
        return [scoring.Result(answer=a, said=s, pair=p) for a, s, p in said]

    # 2 true yes, 1 false yes, 1 missed yes: precision 2/3, recall 2/3.
    assert scoring.f1(
        rows(("yes", "yes", ""), ("yes", "yes", ""), ("no", "yes", ""), ("yes", "no", ""))
    ) == pytest.approx(200 / 3)
    assert scoring.f1(rows(("no", "no", ""))) == 0.0
    # three of four right, one of two pairs wholly right: (75 + 50) / 2.
    twins = rows(("yes", "yes", "a"), ("no", "no", "a"), ("yes", "no", "b"), ("no", "no", "b"))
    assert scoring.mme(twins) == pytest.approx(62.5)
    assert scoring.accuracy(twins) == 75.0
    assert scoring.normalise(" Top left.\n") == "top left"


def test_chance_is_what_the_best_blind_answerer_gets():
    rows = benchmark.build_rows(benchmark.test_scenes())
    always_yes = [scoring.Result(answer=r["answer"], said="yes", pair="") for r in rows["existence"]]
    # A fair coin: half of the questions, a quarter of the pairs.
    blind = {"existence": scoring.f1(always_yes), "counting": (50 + 25) / 2}
    for task in ("attributes", "reading"):
        kinds: dict[str, Counter[str]] = {}
        for r in rows[task]:
            kinds.setdefault(r["kind"], Counter())[r["answer"]] += 1
        blind[task] = 100 * sum(max(count.values()) for count in kinds.values()) / len(rows[task])
    for task in TASKS:
        assert PROTOCOLS[f"scenes_{task}"].chance == pytest.approx(blind[task])


def test_generated_images_show_what_the_benchmark_asks_about():
    scenes = [scene_of(index) for index in range(60)]
    seeds = [scene.seed for scene in scenes]
    assert all(scene.sign and scene.things for scene in scenes)
    assert len(set(seeds)) == len(seeds) and TRAIN_SEEDS[0] <= min(seeds) and max(seeds) < TRAIN_SEEDS[1]
    assert any(sample_scene(seed - 1).sign is None for seed in seeds), "pictures without a sign were passed over"


def test_tuning_asks_in_the_benchmarks_forms():
    kinds = {row["kind"] for rows in benchmark.build_rows(benchmark.test_scenes()).values() for row in rows}
    scenes = [scene_of(index) for index in range(60)]
    for scene in scenes:
        asked = tuning_questions(scene, np.random.RandomState(scene.seed), 7)
        count = Counter(question.task for question in asked)
        assert count["existence"] == count["reading"] == 1 and count["counting"] == 4, count
        assert len(asked) == len({question.text for question in asked}) <= 7
        assert {question.kind for question in asked} <= kinds
        nine = tuning_questions(scene, np.random.RandomState(scene.seed), 9)
        assert nine[:-2] == asked and nine[-2:] == 2 * reading_questions(scene), "the sign weighs three times as much"
    answers = Counter(q.answer for s in scenes for q in tuning_questions(s, np.random.RandomState(s.seed), 7))
    assert abs(answers["yes"] - answers["no"]) < 30, "neither yes nor no may be the better guess"
