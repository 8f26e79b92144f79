"""Protocols of image benchmarks beyond the paper, where compression shows first: grounding, hallucination, reasoning.

All are asked and scored by lmms-eval; ``difference`` says where its score is not the one that the benchmark publishes.
"""

from __future__ import annotations

from .correctness import answer_hits, box_hits, pixel_box_hits
from .protocol import Protocol

_LETTER = "\nAnswer with the option's letter from the given choices directly."

_BOX = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y)."
    " All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the"
    " region this sentence describes: ..."
)
_GROUNDING = {
    **{
        f"{name}_bbox_rec_{split}": Protocol(
            "refcoco_ACC@0.5",
            "fraction",
            None,
            "each sentence about an object is a question of its own; an answer without four numbers in brackets is the"
            " empty box",
            split=split,
            prompt=_BOX,
            cluster="question_id",
            verdicts=box_hits,
        )
        for name in ("refcoco", "refcoco+", "refcocog")
        for split in ("val",)
    },
    **{
        task: Protocol(
            "refcoco_grounding_ACC@0.5",
            "fraction",
            None,
            "all sentences about an object in one question; of several boxes said, each in pixels and in thousandths of"
            " the image, lmms-eval takes the one nearest to the truth",
            split=split,
            prompt='Locate every object that matches the description "..." in the image. Report bbox coordinates in'
            " JSON format.",
            verdicts=pixel_box_hits,
        )
        for task, split in (
            ("refcoco_grounding_testA", "testA"),
            ("refcoco_grounding_testB", "testB"),
            ("refcoco_plus_grounding_testA", "testA"),
            ("refcoco_plus_grounding_testB", "testB"),
            ("refcocog_grounding_test", "test"),
        )
    },
}

_HALLUCINATION = {
    "hallusion_bench_rules": Protocol(
        "aAcc",
        "fraction",
        None,
        "an answer counts as yes where it holds that word, as lmms-eval's second scorer has it; its first one, as"
        " HallusionBench's own, asks GPT-4. Questions with an image only",
        split="image",
        cluster="filename",
        verdicts=answer_hits,
    ),
    "coco_chair_captions": Protocol(
        "chair_objects_there",
        "percent",
        None,
        "CHAIR_i, the share of the objects named that are hallucinated, from 100, so that more is better;"
        " coco_cap_chair_i and coco_cap_chair_s (captions with such an object) beside it are CHAIR's own, where less"
        " is. Longer captions hallucinate more: up to 2048 tokens here, as in lmms-eval",
        split="test",
        prompt="Please describe this image in detail.",
        packages=("nltk",),
    ),
}

_REASONING = {
    "mmstar": Protocol(
        "average",
        "fraction",
        None,
        split="val",
        prompt="\nAnswer with the option's letter from the given choices directly",
        chance=0.25,
    ),
    "ai2d_letters": Protocol(
        "exact_match",
        "fraction",
        None,
        "an option's text without its letter counts as wrong",
        split="test",
        prompt=_LETTER,
    ),
    "mathvista_rules": Protocol(
        "accuracy",
        "fraction",
        None,
        "no judge: the whole answer is what lmms-eval normalises and compares, where MathVista has GPT-4 take the"
        " answer out of the text first; a choice that is not named counts as the most similar one. Ask for short"
        " answers, as this prompt does",
        split="testmini",
        prompt="Answer the question using a single integer number. (and the like, by type of answer)",
        packages=("Levenshtein",),
    ),
}

BEYOND: dict[str, Protocol] = {**_GROUNDING, **_HALLUCINATION, **_REASONING}
