"""What each benchmark's number means: metric, unit, chance, and how it differs from the paper's number.

Facts about lmms-eval are those of 0.7.3's task files; about the paper, of arXiv 2412.04467 and LLaVA's scripts. Metric
keys are lmms-eval's; a key of the form ``a+b`` is the sum of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# fraction: 0..1 as lmms-eval prints it; percent: 0..100; points: a benchmark's own scale.
Unit = Literal["fraction", "percent", "points"]


@dataclass(frozen=True)
class Protocol:
    """How one task is scored.

    Attributes:
        primary: the metric that tables and retention use, ``a+b`` for a sum.
        unit: of the primary metric as lmms-eval gives it.
        paper: what the paper's column is, or None where the paper has none.
        difference: how lmms-eval's default differs from that; empty where it does not.
        chance: of the primary metric, in its unit, for a guesser who follows the answer format; None where it depends
            on the answers' distribution.
        cluster: the key of a sample's score that names questions scored together, or None.
        error: how the standard error is had where lmms-eval gives none: "binomial" where every question counts 0 or 1,
            all the same; "bootstrap" through the task's own aggregation, by clusters; None where lmms-eval gives it.
    """

    primary: str
    unit: Unit
    paper: str | None
    difference: str = ""
    chance: float | None = None
    cluster: str | None = None
    error: Literal["binomial", "bootstrap"] | None = None


PROTOCOLS: dict[str, Protocol] = {
    "gqa": Protocol("exact_match", "fraction", "GQA testdev_balanced, accuracy"),
    "mmbench_en_dev_static": Protocol(
        "gpt_eval_score",
        "percent",
        "MMBench en dev, letters submitted to the server",
        "lmms-eval reads the letter from the answer by rules; no server, no judge model",
        # No chance level: two to four options a question, in shares that are not a constant of the benchmark.
        error="binomial",
    ),
    "mme": Protocol(
        "mme_perception_score+mme_cognition_score",
        "points",
        "MME, perception + cognition (2800 at most)",
        "lmms-eval gives the two parts; their sum is the paper's number",
        # Two yes/no questions a picture: accuracy 50 + both right 25, in each of 14 categories.
        chance=1050.0,
        cluster="question_id",
        error="bootstrap",
    ),
    "pope": Protocol(
        "pope_f1_score",
        "fraction",
        "POPE, mean of the F1 of the random, popular and adversarial splits",
        "lmms-eval pools the three splits and takes one F1; an answer other than exactly yes or no counts for neither",
        chance=0.5,  # half of the answers are yes, a fair coin has precision and recall 0.5
        error="bootstrap",
    ),
    "scienceqa_img": Protocol(
        "exact_match",
        "fraction",
        "ScienceQA; the printed 69.5 is the accuracy over all questions, text-only ones included",
        "lmms-eval asks the questions with a picture only (LLaVA-1.5-7B's official figure for these is 66.8)",
    ),
    "textvqa_val": Protocol(
        "exact_match",
        "fraction",
        "TextVQA val with reference OCR tokens in the prompt (LLaVA's script)",
        "lmms-eval gives no OCR tokens (lmms_eval_specific_kwargs.ocr: false), which lowers LLaVA-1.5 clearly",
    ),
    "mmmu_val": Protocol(
        "mmmu_acc",
        "fraction",
        "MMMU validation",
        "interleaved pictures come in the order of the checkpoint's chat template (LLaVA's: all before the text)",
        error="binomial",
    ),
    "seedbench": Protocol(
        "seed_all",
        "fraction",
        "SEED-Bench, pictures and videos (58.6 for 7B); the 13B table has the picture part",
        "for the picture part read seed_image",
        chance=0.25,
        error="binomial",
    ),
    "vqav2_val": Protocol(
        "exact_match",
        "fraction",
        "VQAv2 test-dev, scored by the EvalAI server",
        "lmms-eval scores the validation split locally",
    ),
    # The built-in benchmark; its chance levels are what `vzip.demo.scoring.chance` finds in its questions.
    "scenes_existence": Protocol("f1", "percent", None, chance=200 / 3, error="bootstrap"),
    "scenes_attributes": Protocol("accuracy", "percent", None, chance=32.25, error="binomial"),
    "scenes_counting": Protocol("mme", "percent", None, chance=37.5, cluster="pair", error="bootstrap"),
    "scenes_reading": Protocol("accuracy", "percent", None, chance=3.75, error="binomial"),
}


def protocol_of(task: str) -> Protocol | None:
    """The protocol of a known benchmark, or None for a task of one's own."""
    return PROTOCOLS.get(task)
