"""Choices: lmms-eval's own scoring code, on local data in the benchmarks' schema, with scores known by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

from vzip.errors import ConfigError, ManifestError
from vzip.evaluation.benchmarks.correctness import mmbench_hits
from vzip.evaluation.run import evaluate
from vzip.results.paired import compare_task

LETTER = "\nAnswer with the option's letter from the given choices directly."
NO_OPTION = "nan"


def test_mmbench_wants_all_rotations(benchmarks, make_image):
    # (index, right letter, options, hint); the second form of a question has the index plus a million.
    forms = [
        (0, "A", ("dog", "cat", "cow"), NO_OPTION),
        (1, "B", ("red", "blue", NO_OPTION), "look up"),
        (2, "A", ("one", "two", NO_OPTION), NO_OPTION),
        (1_000_000, "C", ("cat", "cow", "dog"), NO_OPTION),
        (1_000_002, "B", ("two", "one", NO_OPTION), NO_OPTION),
    ]
    questions = [
        {"index": i, "question": f"q{i}?", "hint": hint, "answer": right, "category": "c", "L2-category": "l"}
        | dict(zip("ABC", options, strict=True))
        | {"D": NO_OPTION, "source": "s", "split": "dev", "comment": NO_OPTION, "image": make_image(0)}
        for i, right, options, hint in forms
    ]
    said = {"q0?": "A", "q1000000?": "C. dog", "q1?": "It is blue", "q2?": "A", "q1000002?": "A"}
    done = benchmarks.run("mmbench_en_dev_static", questions, said)
    # Question 0 is right in both forms, 1 by its text, 2 in one of two forms only.
    assert done.value("gpt_eval_score") == pytest.approx(200 / 3)
    assert [row["scores"]["gpt_eval_score"]["hit"] for row in done.rows] == [1, 1, 0, 1, 0]
    assert [row["scores"]["gpt_eval_score"]["group"] for row in done.rows] == [0, 1, 2, 0, 2]
    # Three questions, not five.
    assert done.error("gpt_eval_score") == (pytest.approx(100 * (2 / 9 / 3) ** 0.5), "binomial")
    options = "There are several options:\nA. red\nB. blue\n"
    assert done.rows[1]["prompt"] == f"USER: <image>\nlook up q1? {options}{LETTER} ASSISTANT:"


def test_mmbench_hits_are_lmms_evals_score():
    draw = random.Random(3)
    texts = ["A", "B.", "(C)", "It is a dog", "red or cow", "The answer is (D).", "banana", "", "none of these"]
    options = {"A": "dog", "B": "red", "C": "cow", "D": NO_OPTION, "category": "c"}
    entries = [
        options | {"index": i + k * 10**6, "answer": "ABC"[k], "prediction": draw.choice([*texts, *["ABC"[k]] * 20])}
        for i in range(60)
        for k in range(draw.choice([1, 2, 3]))
    ]
    draw.shuffle(entries)
    hits = {verdict["group"]: verdict["hit"] for verdict in mmbench_hits(entries)}
    score, *_ = mmbench_evaluator.eval_result([dict(entry) for entry in entries], "static")
    assert len(hits) == 60 and 0.3 < score < 0.9
    assert sum(hits.values()) / 60 == pytest.approx(score)


def test_mmmu(benchmarks, make_image):
    pictures: dict[str, Any] = {f"image_{i}": make_image(i) for i in range(1, 8)}
    choice = {"question_type": "multiple-choice", "options": "['left', 'right', 'up']"}
    questions = [
        {"id": "validation_Art_1", "question": "q0 <image 1> or <image 2>?", "answer": "B"} | choice,
        {"id": "validation_Art_2", "question": "q1 <image 1>?", "answer": "A"} | choice,
        {"id": "validation_Math_1", "question": "q2 <image 1>?", "question_type": "open", "options": "[]"}
        | {"answer": "1000"},
        {"id": "validation_Math_2", "question": "q3 <image 1>?", "question_type": "open", "options": "[]"}
        | {"answer": "['pi', '3.14']"},
    ]
    questions = [entry | pictures for entry in questions]
    said = {"q0": "The answer is (B).", "q1": "C", "q2": "So the result is 1,000.", "q3": "3"}
    done = benchmarks.run("mmmu_val", questions, said)
    assert done.value("mmmu_acc") == 0.5
    assert [row["scores"]["mmmu_acc"]["hit"] for row in done.rows] == [1, 0, 1, 0]
    assert done.error("mmmu_acc") == (pytest.approx((0.25 / 4) ** 0.5), "binomial")
    prompt = done.rows[0]["prompt"]
    assert prompt.startswith("USER: <image>\n<image>\nq0") and "A. left\nB. right\nC. up\n" in prompt
    assert [picture.size for picture in done.pictures[prompt]] == [(60, 41), (60, 42)]
    assert "single word or phrase" in done.rows[2]["prompt"] and "letter" not in done.rows[2]["prompt"]


def test_two_runs_are_compared_question_by_question(benchmarks, make_image):
    """MMBench and MMMU, whose samples lmms-eval leaves without a verdict."""
    about = {"hint": NO_OPTION, "category": "c", "L2-category": "l", "source": "s", "split": "dev"}
    about |= {"A": "dog", "B": "cat", "C": NO_OPTION, "D": NO_OPTION, "answer": "A", "image": make_image(0)}
    mmbench = [about | {"index": i, "question": f"q{i % 10**6}?"} for i in (0, 1, 2, 3, 1_000_000)]
    mmmu = [
        {"id": f"validation_Art_{i}", "question": f"q{i} <image 1>?", "answer": "A", "question_type": "multiple-choice"}
        | {"options": "['left', 'right']", "image_1": make_image(0)}
        for i in range(4)
    ]
    for task, questions in (("mmbench_en_dev_static", mmbench), ("mmmu_val", mmmu)):
        vanilla = benchmarks.run(task, questions, {"q0": "A", "q1": "A", "q2": "B", "q3": "A"})
        ours = benchmarks.run(task, questions, {"q0": "B", "q1": "A", "q2": "A", "q3": "B"})
        metric = ours.entry["primary_metric"]
        paired = compare_task(ours.record, vanilla.record, f"own_{task}", metric, ours.rows, vanilla.rows)
        assert paired is not None and paired.is_paired, task
        assert (paired.num_lost, paired.num_gained) == (2, 1), "questions, not their rotations"
        assert paired.retention == pytest.approx(2 / 3)


def test_mmstar_is_the_mean_over_categories(benchmarks, make_image):
    truth = [("math", "geometry", "A"), ("math", "geometry", "B"), ("math", "statistical reasoning", "C")]
    questions = [
        {"index": i, "question": f"q{i}?", "image": make_image(0), "answer": answer, "category": kind}
        | {"l2_category": part}
        for i, (kind, part, answer) in enumerate(truth)
    ]
    done = benchmarks.run("mmstar", questions, {"q0": "A", "q1": "(C)", "q2": "The answer is C."})
    assert done.value("average") == pytest.approx((0.5 + 1) / 2), "2 of 3 are right"
    assert done.entry["chance"] == 0.25 and done.error("average")[1] == "bootstrap"


SEED = ["image", "image", "video", "image"]


@pytest.mark.parametrize("task", ["seedbench", "seedbench_frame", "seedbench_image"])
def test_seedbench(task, benchmarks, make_image):
    frames = [make_image(i) for i in range(3)]
    questions = [
        {"image": frames if kind == "video" else frames[:1], "question": f"q{i}?", "answer": "B", "data_type": kind}
        | {f"choice_{letter}": letter for letter in "abcd"}
        | {"question_id": str(i), "data_id": f"d{i // 2}"}
        for i, kind in enumerate(SEED)
    ]
    done = benchmarks.run(task, questions, {"q0": "B", "q1": "b", "q2": "A", "q3": "C. c"})
    assert done.value("seed_image") == pytest.approx(2 / 3)
    if task == "seedbench_image":
        assert len(done.rows) == 3 and list(done.entry["metrics"]) == ["seed_image"]
        return
    assert done.value("seed_all") == 0.5 and done.value("seed_video") == 0
    # Two images of two questions: one all right, one all wrong.
    assert done.error("seed_all") == (pytest.approx(0.5), "clustered")
    shown = [picture.size for picture in done.pictures[done.rows[2]["prompt"]]]
    assert shown == ([(60, 41)] if task == "seedbench_frame" else [(60, 40), (60, 41), (60, 42)])


@pytest.mark.parametrize("task", ["scienceqa_img", "scienceqa_overall"])
def test_scienceqa(task, benchmarks, make_image):
    truth = [(make_image(0), 0, ""), (make_image(1), 1, "a hint"), (make_image(2), 1, "")]
    if task == "scienceqa_overall":
        truth.append((None, 0, "words only"))
    questions = [
        {"image": image, "question": f"q{i}?", "choices": ["p", "q"], "answer": a, "hint": hint}
        for i, (image, a, hint) in enumerate(truth)
    ]
    done = benchmarks.run(task, questions, {"q0": "A", "q1": "B. q", "q2": "A", "q3": "a"})
    prompt = f"Context: a hint\nq1?\nA. p\nB. q{LETTER} ASSISTANT:"
    assert done.rows[1]["prompt"] == f"USER: <image>\n{prompt}"
    if task == "scienceqa_img":
        assert done.value("exact_match") == pytest.approx(2 / 3)
    else:
        assert (done.value("exact_match"), done.value("exact_match_image")) == (0.75, pytest.approx(2 / 3))
        assert done.rows[3]["num_visual_tokens"] == [] and "<image>" not in done.rows[3]["prompt"]


BROKEN = {"bytes": b"no picture", "path": None}


def test_mme_without_an_image_leaves_out_its_other_question(benchmarks, make_image):
    questions = [
        {"question_id": f"existence/{i // 2}.png", "question": f"q{i}?", "category": "existence"}
        | {"answer": "Yes", "image": BROKEN if i == 3 else make_image(0)}
        for i in range(6)
    ]
    said = {"q0": "Yes", "q1": "Yes", "q2": "Yes", "q4": "Yes", "q5": "No"}
    done = benchmarks.run("mme", questions, said, on_problem="skip")
    assert done.value("mme_perception_score") == (200 + 50) / 2, "of two images, not of three"
    assert [row["doc_id"] for row in done.rows] == [0, 1, 4, 5]
    problems = {entry["doc_id"]: entry["problem"] for entry in done.record["left_out"]}
    assert problems[2] == "is scored together with question 3, which cannot be asked"
    assert set(problems) == {2, 3} and "cannot identify image" in problems[3]
    assert done.record["provisional"]


def test_mmbench_without_a_rotation_leaves_out_its_question(benchmarks, make_image):
    options = {"A": "dog", "B": "cat", "C": NO_OPTION, "D": NO_OPTION}
    questions = [
        {"index": i, "question": f"q{i}?", "hint": NO_OPTION, "answer": "A", "category": "c", "L2-category": "l"}
        | options
        | {"source": "s", "split": "dev", "image": BROKEN if i == 1_000_001 else make_image(0)}
        for i in (0, 1, 2, 1_000_000, 1_000_001)
    ]
    said = {"q0?": "A", "q1?": "A", "q2?": "B", "q1000000?": "A"}
    done = benchmarks.run("mmbench_en_dev_static", questions, said, on_problem="skip")
    assert done.value("gpt_eval_score") == 50 and [row["doc_id"] for row in done.rows] == [0, 2, 3]


def test_an_image_that_cannot_be_read_is_no_wrong_answer(benchmarks, make_image):
    questions = [
        {
            "question": f"q{i}?",
            "hint": "",
            "choices": ["p", "q"],
            "answer": 0,
            "image": BROKEN if i else make_image(0),
        }
        for i in range(2)
    ]
    with pytest.raises(
        ManifestError, match=r"1 of 2 questions cannot be asked(.*\n)+.*own_scienceqa_overall, question 1"
    ):
        benchmarks.run("scienceqa_overall", questions, {"q0": "A"})


def test_half_of_mmes_questions_about_an_image_are_refused_before_anything_is_asked(benchmarks):
    with pytest.raises(ConfigError, match=r"limit=3: mme scores 2 questions about an image together"):
        evaluate(benchmarks.scripted(lambda prompt: ""), tasks=["mme"], limit=3, run_dir=benchmarks.folder / "run")
    assert not (benchmarks.folder / "run").exists()
