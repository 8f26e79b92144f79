"""Short answers: lmms-eval's own scoring code, on local data in the benchmarks' schema, with scores known by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from vzip.evaluation.benchmarks.protocols import PROTOCOLS

PROMPT = "USER: <image>\n{}\nAnswer the question using a single word or phrase. ASSISTANT:"


def annotated(*answers: str) -> list[dict[str, Any]]:
    """VQAv2's ten annotators."""
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, start=1)]


def test_gqa(benchmarks, make_image):
    truth = [("a", "q0?", "yes"), ("a", "q1?", "dog"), ("b", "q2?", "cat"), ("b", "q3?", "left")]
    questions = [{"imageId": i, "question": q, "answer": a, "image": make_image(0)} for i, q, a in truth]
    said = {"q0": "Yes.", "q1": "Dog", "q2": "dog", "q3": "the left"}
    # process_docs fetches the images from the hub; here they stand in the rows.
    done = benchmarks.run("gqa", questions, said, "process_docs: null\n")
    assert done.value("exact_match") == 0.5, "case and punctuation do not matter, other words do"
    assert done.rows[0]["prompt"] == PROMPT.format("q0?")
    assert [row["cluster"] for row in done.rows] == ["a", "a", "b", "b"] and done.entry["cluster"] == "imageId"
    # Image a is 1/2 above the mean twice, image b below it: sqrt(2 / (2 - 1) * (1 + 1)) / 4.
    assert done.error("exact_match") == (pytest.approx(0.5), "clustered")


def test_vqav2_counts_agreeing_annotators(benchmarks, make_image):
    questions = [
        {"question": "q0?", "question_id": 1, "image_id": 7, "answers": annotated(*["2"] * 4, *["3"] * 6)},
        {"question": "q1?", "question_id": 2, "image_id": 7, "answers": annotated(*["stop"] * 2, *["go"] * 8)},
        {"question": "q2?", "question_id": 3, "image_id": 8, "answers": annotated(*["red"] * 10)},
    ]
    questions = [entry | {"answer": "x", "image": make_image(0)} for entry in questions]
    done = benchmarks.run("vqav2_val", questions, {"q0": "Two", "q1": "the stop", "q2": "blue"})
    # Three of four others suffice; two of ten: each left out in turn gives (8 * 2/3 + 2 * 1/3) / 10 = 0.6.
    assert [row["scores"]["exact_match"] for row in done.rows] == [1, pytest.approx(0.6), 0]
    assert done.value("exact_match") == pytest.approx(1.6 / 3)
    assert done.rows[0]["prompt"] == PROMPT.format("q0?")
    assert [row["cluster"] for row in done.rows] == [7, 7, 8]


def test_vizwiz(benchmarks, make_image):
    questions = [
        {"question": "what IS it?", "question_id": "v0.jpg", "answers": ["unanswerable"] * 9 + ["mug"]},
        {"question": "which colour?", "question_id": "v1.jpg", "answers": ["blue", "blue", *["red"] * 8]},
    ]
    questions = [entry | {"image": make_image(0)} for entry in questions]
    done = benchmarks.run("vizwiz_vqa_val", questions, {"What is": "Unanswerable", "Which": "Blue"})
    assert done.value("exact_match") == pytest.approx((1 + 0.6) / 2)
    asked = "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert done.rows[0]["prompt"] == PROMPT.format(asked)


@pytest.mark.parametrize("task", ["textvqa_val", "textvqa_val_ocr"])
def test_textvqa(task, benchmarks, make_image):
    answers = ["stop", "stop", *["go"] * 8]
    question = {"question": "what does it SAY?", "question_id": 7, "image_id": "x", "answers": answers, "answer": "x"}
    question |= {"image": make_image(0), "ocr_tokens": ["STOP", "Go"]}
    done = benchmarks.run(task, [question], {"What": "Stop"})
    assert done.value("exact_match") == pytest.approx(0.6)
    tokens = "\nReference OCR token: STOP, Go" if task.endswith("ocr") else ""
    assert done.rows[0]["prompt"] == PROMPT.format(f"What does it say?{tokens}")
    assert list((benchmarks.folder / "run" / "submissions").iterdir()), "submission files belong into the run directory"


# (split, image, truth, said)
POPE = [
    ("adversarial", "p", "yes", "Yes"),
    ("adversarial", "p", "yes", "no"),
    ("adversarial", "q", "no", "yes"),
    ("adversarial", "q", "no", "No"),
    ("popular", "p", "yes", "yes"),
    ("popular", "q", "no", "no"),
    ("random", "p", "yes", "yes"),
    ("random", "q", "no", "yes"),
]


@pytest.mark.parametrize("task", ["pope", "pope_splits"])
def test_pope(task, benchmarks, make_image):
    number = count()
    questions = [
        {"question_id": str(next(number)), "category": split, "image_source": picture, "answer": truth}
        for split, picture, truth, _ in POPE
    ]
    for entry in questions:
        entry |= {"question": f"Is there a dog{entry['question_id']}?", "image": make_image(0)}
    done = benchmarks.run(task, questions, {f"dog{i}?": said for i, (*_, said) in enumerate(POPE)})
    # All together: 3 true positives, 2 false positives, 1 false negative.
    assert done.value("pope_f1_score") == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert done.value("pope_accuracy") == pytest.approx(5 / 8)
    if task == "pope_splits":
        # adversarial: one true and one false positive, one false negative; popular: all right; random: yes to both.
        assert done.value("pope_f1_mean") == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert done.entry["primary_metric"] == {"pope": "pope_f1_score", "pope_splits": "pope_f1_mean"}[task]
    assert done.entry["unit"] == "fraction"
    assert [row["cluster"] for row in done.rows] == list("ppqqpqpq")
    error, source = done.error(done.entry["primary_metric"])
    assert source == "bootstrap" and 0.02 < error < 0.5
    assert done.rows[0]["prompt"] == PROMPT.format("Is there a dog0?")


def test_mme_sums_both_parts(benchmarks, make_image):
    questions, said = [], {}
    # existence: image a both right (200), image b one right (50); code_reasoning: one image, one right (50).
    for category, picture, right in (
        ("existence", "a", (True, True)),
        ("existence", "b", (True, False)),
        ("code_reasoning", "c", (False, True)),
    ):
        for number, (answer, correct) in enumerate(zip(("Yes", "No"), right, strict=True)):
            question = f"{picture}{number}? Please answer yes or no."
            questions.append({"question_id": f"{category}/{picture}.png", "question": question, "category": category})
            questions[-1] |= {"answer": answer, "image": make_image(number)}
            said[f"{picture}{number}?"] = answer if correct else {"Yes": "No", "No": "Yes"}[answer]
    done = benchmarks.run("mme", questions, said)
    assert done.value("mme_perception_score") == (200 + 50) / 2
    assert done.value("mme_cognition_score") == 50
    total = "mme_perception_score+mme_cognition_score"
    assert done.value(total) == 175 and done.entry["primary_metric"] == total
    # Two images of scores 200 and 50: drawing two gives 200, 125 or 50 with 1/4, 1/2, 1/4, so 53.03.
    assert done.error("mme_perception_score") == (pytest.approx(53.03, rel=0.15), "bootstrap")
    assert done.error("mme_cognition_score") == (None, None), "one image has no spread"
    assert done.error(total) == (None, None)
    assert "Please answer" not in done.rows[0]["prompt"]


def test_chartqa_allows_five_percent(benchmarks, make_image):
    truth = [("human_test", "100"), ("human_test", "100"), ("augmented_test", "12%"), ("augmented_test", "Peru")]
    questions = [
        {"type": kind, "question": f"q{i}?", "answer": answer, "image": make_image(0)}
        for i, (kind, answer) in enumerate(truth)
    ]
    done = benchmarks.run("chartqa", questions, {"q0": "105", "q1": "106", "q2": "0.12", "q3": "peru"})
    assert done.value("relaxed_overall") == 0.75
    assert (done.value("relaxed_human_split"), done.value("relaxed_augmented_split")) == (0.5, 1)
    assert done.error("relaxed_overall") == (pytest.approx((0.75 * 0.25 / 3) ** 0.5), "lmms-eval")


def test_docvqa_counts_letters(benchmarks, make_image):
    questions = [
        {"questionId": "1", "question": "q0?", "docId": 5, "answers": ["hello world", "hi"], "image": make_image(0)},
        {"questionId": "2", "question": "q1?", "docId": 6, "answers": ["42"], "image": make_image(0)},
    ]
    done = benchmarks.run("docvqa_val", questions, {"q0": "Helo world", "q1": "17"})
    # One letter of eleven is missing; an answer that is more than half wrong counts nothing.
    assert done.value("anls") == pytest.approx((1 - 1 / 11) / 2)
    assert [row["cluster"] for row in done.rows] == [5, 6]


def test_ocrbench_is_the_share_of_the_questions_asked(benchmarks, make_image):
    truth = [
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["x + y"]),
        ("SVT", "Regular Text Recognition", ["Stop"]),
        ("SVT", "Regular Text Recognition", ["Go", "Left"]),
    ]
    questions = [
        {"dataset": data, "question_type": kind, "question": f"q{i}?", "answer": answer, "image": make_image(0)}
        for i, (data, kind, answer) in enumerate(truth)
    ]
    done = benchmarks.run("ocrbench_mean", questions, {"q0": "it is x+y", "q1": "it says STOP.", "q2": "right"})
    assert done.value("ocrbench_accuracy") == pytest.approx(2 / 3)
    assert done.error("ocrbench_accuracy")[0] == pytest.approx((2 / 9 / 2) ** 0.5)


def test_vqav2s_test_questions_leave_a_file_for_the_server(benchmarks, make_image, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "vqav2_test", replace(PROTOCOLS["vqav2_val"], split="test"))
    question = {"question": "q0?", "question_id": 5, "image_id": 3, "image": make_image(0), "answer": ""}
    done = benchmarks.run("vqav2_test", [question], {"q0": "Two"})
    assert done.entry["primary_metric"] is None and done.entry["metrics"] == {}
    (file,) = (benchmarks.folder / "run" / "submissions").iterdir()
    assert json.loads(file.read_text()) == [{"question_id": 5, "answer": "Two"}]
