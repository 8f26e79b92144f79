"""Benchmarks beyond the paper: lmms-eval's own scoring code, on local data in the benchmarks' schema."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from lmms_eval.tasks.hallusion_bench import evaluate_hb
from lmms_eval.tasks.refcoco import utils_rec

from vzip.errors import MissingPackageError, UnsupportedModelError
from vzip.evaluation.benchmarks import catalog
from vzip.evaluation.benchmarks.unused_packages import _Unused
from vzip.results.score_units import units_of


def test_infovqa_counts_letters_by_image(benchmarks, make_image):
    questions = [
        {
            "questionId": str(i),
            "question": f"q{i}?",
            "answers": ["42 percent"],
            "image_url": url,
            "image": make_image(0),
        }
        for i, url in enumerate(["a", "a", "b"])
    ]
    done = benchmarks.run("infovqa_val", questions, {"q0": "42 percent", "q1": "42 percen", "q2": "no"})
    assert done.value("anls") == pytest.approx((1 + 0.9) / 3)
    assert [row["cluster"] for row in done.rows] == ["a", "a", "b"]


def test_refcocos_sentences_are_questions_of_their_own(benchmarks, make_image):
    image = make_image(0)  # 60 x 40
    shared = {"question": "?", "segmentation": [0.0], "iscrowd": 0, "file_name": "x.jpg", "image": image}
    questions = [
        {"question_id": "0", "answer": ["left dog", "big dog"], "bbox": [6.0, 4.0, 30.0, 20.0], **shared},
        {"question_id": "1", "answer": ["the sky"], "bbox": [0.0, 0.0, 60.0, 20.0], **shared},
    ]
    boxes = {"left dog": "[0.1, 0.1, 0.6, 0.6]", "big dog": "At [0.1, 0.1, 0.6, 0.3].", "the sky": "above"}
    done = benchmarks.run("refcoco_bbox_rec_val", questions, boxes, member="group")
    entries = [row["scores"]["refcoco_ACC@0.5"] for row in done.rows]
    assert [entry["hit"] for entry in entries] == [1, 0, 0]
    assert done.value("refcoco_ACC@0.5") == utils_rec.refcoco_bbox_rec_acc05(entries) == pytest.approx(1 / 3)
    assert done.value("refcoco_IoU") == pytest.approx((1 + 0.4 + 0) / 3)
    assert [row["cluster"] for row in done.rows] == ["0", "0", "1"]
    assert done.error("refcoco_ACC@0.5")[1] == "clustered"
    assert (
        done.entry["protocol"]["task_file"].endswith(".yaml") and "between 0 and 1" in done.entry["protocol"]["prompt"]
    )
    assert done.entry["protocol"]["generation"]["max_new_tokens"] == 128


def test_boxes_in_pixels_or_thousandths(benchmarks, make_image):
    image = make_image(0)
    questions = [
        {
            "question_id": str(i),
            "question": "?",
            "answer": [f"thing{i}"],
            "bbox": [6.0, 4.0, 30.0, 20.0],
            "image": image,
        }
        for i in range(3)
    ]
    said = {
        "thing0": '```json\n[{"bbox_2d": [6, 4, 36, 24], "label": "x"}]\n```',
        "thing1": '{"bbox_2d": [100, 100, 600, 600]}',
        "thing2": "nowhere",
    }
    done = benchmarks.run("refcoco_grounding_testA", questions, said)
    assert [row["scores"]["refcoco_grounding_ACC@0.5"]["hit"] for row in done.rows] == [1, 1, 0]
    assert done.value("refcoco_grounding_ACC@0.5") == pytest.approx(2 / 3)
    assert done.error("refcoco_grounding_ACC@0.5") == (pytest.approx((2 / 9 / 3) ** 0.5), "binomial")


def test_hallusion_bench_by_rules(benchmarks, make_image):
    truth = [
        ("1", "0", "0", "1", "Yes, it is."),
        ("1", "1", "0", "0", "no"),
        ("2", "0", "1", "0", "Yes"),
        ("2", "1", "1", "1", "yes"),
    ]
    questions = [
        {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": figure, "question_id": number}
        | {"gt_answer": answer, "gt_answer_details": "d", "filename": f"{figure}.png", "question": f"q{i}?"}
        | {"image": make_image(0)}
        for i, (number, figure, _, answer, _) in enumerate(truth)
    ]
    done = benchmarks.run("hallusion_bench_rules", questions, {f"q{i}?": said for i, (*_, said) in enumerate(truth)})
    entries = [row["scores"]["aAcc"] for row in done.rows]
    assert [entry["hit"] for entry in entries] == [1, 1, 0, 1]
    for metric, expected in (("aAcc", 3 / 4), ("qAcc", 1 / 2), ("fAcc", 1 / 2)):
        assert done.value(metric) == evaluate_hb.hb_aggregation_result_intern(entries, metric) == expected
    assert "GPT-4" in done.entry["protocol"]["difference"] and done.entry["primary_metric"] == "aAcc"


def test_ai2d(benchmarks, make_image):
    questions = [
        {"question": f"q{i}?", "options": ["sun", "moon", "sea"], "answer": str(right), "image": make_image(0)}
        for i, right in enumerate((0, 1, 2))
    ]
    done = benchmarks.run("ai2d_letters", questions, {"q0": "A", "q1": "B. moon", "q2": "sea"})
    assert done.value("exact_match") == pytest.approx(2 / 3) and done.entry["primary_metric"] == "exact_match"
    assert "q0?\nA. sun\nB. moon\nC. sea\nAnswer with the option's letter" in done.rows[0]["prompt"]


def test_mathvista_without_its_judge(benchmarks, make_image):
    pytest.importorskip("Levenshtein")
    kinds = [
        ("multi_choice", "text", ["cat", "dog"], "dog", "(B)", 1),
        ("multi_choice", "text", ["cat", "dog"], "dog", "cats", 0),
        ("free_form", "integer", None, "14", "14", 1),
        ("free_form", "float", None, "1.5", "1.49", 1),
        ("free_form", "integer", None, "14", "It is 14", 0),
    ]
    questions = [
        {"pid": str(i), "question": f"q{i}?", "question_type": kind, "answer_type": answers, "choices": choices}
        | {"answer": right, "precision": 1.0, "unit": None, "query": "", "caption": ""}
        | {"ocr": "", "decoded_image": make_image(0)}
        for i, (kind, answers, choices, right, *_) in enumerate(kinds)
    ]
    said = {f"q{i}?": kind[4] for i, kind in enumerate(kinds)}
    done = benchmarks.run("mathvista_rules", questions, said)
    assert [row["scores"]["accuracy"] for row in done.rows] == [kind[5] for kind in kinds]
    assert "single integer number" in done.rows[2]["prompt"]


CAPTIONS = [(["dog", "person"], ["dog", "cat", "dog"]), (["car"], ["car"]), (["bus", "cup"], [])]


def test_chair_is_lmms_evals(monkeypatch):
    if catalog.importlib.util.find_spec("nltk") is None:  # its functions tag words with it; these do not
        for name in ("nltk", "nltk.corpus", "nltk.stem"):
            monkeypatch.setitem(sys.modules, name, _Unused(name))
    from lmms_eval.tasks.coco_cap_chair import utils

    from vzip.evaluation.benchmarks import chair

    entries: list[dict[str, Any]] = [
        {"answer": there, "pred": named, "image_id": i} for i, (there, named) in enumerate(CAPTIONS)
    ]
    assert chair.objects_there(entries) == 100 - utils.coco_cap_chair_aggregate_results_chair_i(entries) == 75
    found = units_of(
        "chair_objects_there", [{"doc_id": i, "scores": {"chair_objects_there": e}} for i, e in enumerate(entries)]
    )
    assert found is not None and found.score == 75
    assert chair.objects_there(entries[2:]) == 0, "captions that name nothing"


def test_what_scoring_needs_is_asked_for_first(monkeypatch):
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"task coco_chair_captions needs the package nltk.*leave it out"):
        catalog.find_tasks(["mme", "coco_chair_captions"], None)
    with pytest.raises(MissingPackageError, match=r"task mathvista_rules needs the package Levenshtein"):
        catalog.check_packages(["mathvista_rules"])
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(catalog, "_has_data", lambda place: place != "corpora/wordnet.zip")
    with pytest.raises(MissingPackageError, match=r"nltk lacks its data wordnet\. .*python -m nltk.downloader wordnet"):
        catalog.check_packages(["coco_chair_captions"])


@pytest.mark.parametrize(
    ("task", "instead"),
    [
        ("hallusion_bench_image", "hallusion_bench_rules"),
        ("mathvista_testmini_format", "mathvista_rules"),
        ("videomme", "videomme_frames"),
        ("longvideobench_val_v", "longvideobench_frames"),
    ],
)
def test_what_lmms_eval_judges_or_decodes_by_itself_is_refused(task, instead):
    with pytest.raises(UnsupportedModelError, match=rf"task {task}: .*Use eval.tasks=\[{instead}\]"):
        catalog.find_tasks([task], None)


@pytest.mark.parametrize(("task", "metric"), [("videochatgpt", "gpt_eval_score_"), ("mia_bench", "gpt_eval_score")])
def test_a_task_whose_metric_is_a_judges_is_refused_and_one_by_rules_is_not(task, metric):
    with pytest.raises(UnsupportedModelError, match=rf"its metric {metric}.* is a judge model's"):
        catalog.find_tasks([task], None)
    assert "vizwiz_vqa_val" in catalog.find_tasks(["vizwiz_vqa_val", "docvqa_val"], None).all_tasks
