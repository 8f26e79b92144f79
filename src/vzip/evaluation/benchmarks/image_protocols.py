"""Protocols of the image benchmarks.

``paper`` and ``difference`` rest on arXiv 2412.04467, on LLaVA's docs/Evaluation.md and scripts (which the paper's
repository names as a way to evaluate), and on the installed lmms-eval 0.7.3; ``split`` and ``prompt`` are held against
its task files by tests/evaluation/test_protocol.py.
"""

from __future__ import annotations

from vzip.results.record import JUDGE_SCORE

from .beyond_protocols import BEYOND
from .correctness import mmbench_groups, mmbench_hits, mme_images, mmmu_hits
from .protocol import Protocol

_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."

_GQA = {
    "gqa": Protocol(
        "exact_match",
        "fraction",
        "GQA testdev_balanced, accuracy",
        split="testdev_balanced_instructions/testdev",
        prompt=_SHORT,
        cluster="imageId",
    ),
}

_MMBENCH = {
    "mmbench_en_dev_static": Protocol(
        "gpt_eval_score",
        "percent",
        "MMBench en dev (20230712), letters submitted to the server",
        'lmms-eval reads the letters by rules, without a server or a judge; "There are several options:" stands before'
        " the options",
        split="en/dev",
        prompt=_LETTER,
        # Both count a question where all rotations of its options are answered rightly. No chance level: two to four
        # options a question, in shares that are not a constant of the benchmark.
        together=mmbench_groups,
        verdicts=mmbench_hits,
    ),
}

_MME = {
    "mme": Protocol(
        "mme_perception_score+mme_cognition_score",
        "points",
        "MME, perception + cognition (2800 at most)",
        split="test",
        prompt=_SHORT,
        # Two yes/no questions an image: accuracy 50 + both right 25, in each of 14 categories.
        chance=1050.0,
        cluster="question_id",
        together=mme_images,
        limit_step=2,
    ),
}

_POPE = {
    "pope_splits": Protocol(
        "pope_f1_mean",
        "fraction",
        "POPE, mean of the F1 of the random, popular and adversarial splits",
        "an answer other than yes or no counts for neither; in LLaVA's script all without a no or a not is a yes",
        split="test",
        prompt=_SHORT,
        chance=0.5,  # half of the answers are yes, a fair coin has precision and recall 0.5
        cluster="image_source",
    ),
    "pope": Protocol(
        "pope_f1_score",
        "fraction",
        "POPE, mean of the F1 of the random, popular and adversarial splits",
        "lmms-eval pools the three splits and takes one F1; an answer other than exactly yes or no counts for neither",
        split="test",
        prompt=_SHORT,
        chance=0.5,
        cluster="image_source",
    ),
}

_SCIENCEQA = {
    "scienceqa_overall": Protocol(
        "exact_match",
        "fraction",
        "ScienceQA test, accuracy over all questions, text-only ones included",
        "at most 16 new tokens, where LLaVA's script allows 1024",
        split="ScienceQA-FULL/test",
        prompt=_LETTER,
    ),
    "scienceqa_img": Protocol(
        "exact_match",
        "fraction",
        "ScienceQA test; the printed 69.5 is the accuracy over all questions, text-only ones included",
        "lmms-eval asks the questions with an image only (LLaVA-1.5-7B's official figure for these is 66.8)",
        split="ScienceQA-IMG/test",
        prompt=_LETTER,
    ),
}

_VQAV2 = {
    "vqav2_val": Protocol(
        "exact_match",
        "fraction",
        "VQAv2 test-dev, scored by the EvalAI server",
        "the validation split, scored locally; vqav2_test asks the 447 793 test questions and writes the file that the"
        " server takes, into the run directory",
        split="validation",
        prompt=_SHORT,
        cluster="image_id",
    ),
}

_TEXTVQA = {
    "textvqa_val_ocr": Protocol(
        "exact_match",
        "fraction",
        "TextVQA val with reference OCR tokens in the prompt (LLaVA's script)",
        "OCR tokens of the data set on the hub; the question with its first letter large and all others small",
        split="validation",
        prompt="\nReference OCR token: ..." + _SHORT,
        cluster="image_id",
    ),
    "textvqa_val": Protocol(
        "exact_match",
        "fraction",
        "TextVQA val with reference OCR tokens in the prompt (LLaVA's script)",
        "lmms-eval gives no OCR tokens (lmms_eval_specific_kwargs.ocr: false), which lowers LLaVA-1.5 clearly",
        split="validation",
        prompt=_SHORT,
        cluster="image_id",
    ),
}

_MMMU = {
    "mmmu_val": Protocol(
        "mmmu_acc",
        "fraction",
        "MMMU validation",
        "several images come in the order of the checkpoint's chat template (LLaVA's: all before the text); an answer"
        " in which no option is found counts as one drawn by chance, as in MMMU's own script",
        split="validation",
        prompt=f"\n{_LETTER}, or for open questions \n{_SHORT}",
        verdicts=mmmu_hits,
    ),
}

_SEED = {
    "seedbench_frame": Protocol(
        "seed_all",
        "fraction",
        "SEED-Bench, images and videos, one middle frame a video; SEED-I is the image part (seed_image)",
        "the middle one of the frames that the data set on the hub keeps of a video",
        split="test",
        prompt=_LETTER,
        chance=0.25,
        cluster="data_id",
    ),
    "seedbench_image": Protocol(
        "seed_image",
        "fraction",
        "SEED-Bench, image part (SEED-I)",
        split="test",
        prompt=_LETTER,
        chance=0.25,
        cluster="data_id",
    ),
    "seedbench": Protocol(
        "seed_all",
        "fraction",
        "SEED-Bench, images and videos, one middle frame a video; SEED-I is the image part (seed_image)",
        "lmms-eval shows all frames that the data set keeps of a video (eight of 576 visual tokens would not fit"
        " LLaVA-1.5's context of 4096)",
        split="test",
        prompt=_LETTER,
        chance=0.25,
        cluster="data_id",
    ),
}

_VIZWIZ = {
    "vizwiz_vqa_val": Protocol(
        "exact_match",
        "fraction",
        "VizWiz-VQA test, scored by the EvalAI server",
        "the validation split, scored locally; vizwiz_vqa_test writes the file that the server takes",
        split="val",
        prompt="\nWhen the provided information is insufficient, respond with 'Unanswerable'." + _SHORT,
    ),
}

_JUDGED = {
    "mmvet_direct": Protocol(
        JUDGE_SCORE,
        "percent",
        "MM-Vet, graded by GPT-4 (which version, and how often, is not said)",
        "graded once, with the prompt of MM-Vet's script, by the judge that the record names",
        split="test",
        judge="gpt-4-0613, or what --model names",
    ),
    "llava_bench_wild": Protocol(
        JUDGE_SCORE,
        "percent",
        "LLaVA-Bench (in the wild), rated by GPT-4 (which version is not said) against the answers of text-only GPT-4",
        "rated with the prompt of LLaVA's script, by the judge that the record names, at temperature 0 for its 0.2",
        split="train",
        judge="gpt-4, or what --model names",
        cluster="image_id",
    ),
}

# Not in the paper: reading text is where fewer tokens hurt most.
_OCR = {
    "chartqa": Protocol(
        "relaxed_overall",
        "fraction",
        None,
        split="test",
        prompt="\nAnswer the question with a single word.",
    ),
    "docvqa_val": Protocol(
        "anls",
        "fraction",
        None,
        split="DocVQA/validation",
        prompt=_SHORT,
        cluster="docId",
    ),
    "ocrbench_mean": Protocol(
        "ocrbench_accuracy",
        "fraction",
        None,
        "lmms-eval's `ocrbench` divides by 1000 however many questions were asked",
        split="test",
    ),
    "infovqa_val": Protocol(
        "anls",
        "fraction",
        None,
        split="InfographicVQA/validation",
        prompt=_SHORT,
        cluster="image_url",
    ),
}

IMAGE: dict[str, Protocol] = {
    **_GQA,
    **_MMBENCH,
    **_MME,
    **_POPE,
    **_SCIENCEQA,
    **_VQAV2,
    **_TEXTVQA,
    **_MMMU,
    **_SEED,
    **_VIZWIZ,
    **_JUDGED,
    **_OCR,
    **BEYOND,
}
