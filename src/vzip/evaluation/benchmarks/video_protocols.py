"""Protocols of the video benchmarks: the paper's Table 3 (``video_qa.VIDEO_SETS``), and choices that need no judge.

``paper`` and ``difference`` rest on arXiv 2412.04467, on Video-LLaVA's scripts (PKU-YuanGroup/Video-LLaVA,
scripts/v1_5/eval and videollava/eval/video) and on Video-ChatGPT's README of its quantitative evaluation.
"""

from __future__ import annotations

from vzip.results.record import JUDGE_ACCURACY

from .protocol import Protocol
from .video_qa import VIDEO_SETS

_PAPER = "accuracy by a judge model, in Video-ChatGPT's zero-shot protocol; which judge, the paper does not say"
_DIFFERENCE = (
    "question and answer are joined by id, where Video-LLaVA's script on several GPUs joins them wrongly by position;"
    " the judge is asked with temperature 0 and is the model named in the record: gpt-3.5-turbo's versions differ by up"
    " to 8 points (Video-LLaVA issue 37)"
)
_OWN = {
    "tgif_qa_zero_shot": "Video-ChatGPT took TGIF's Frame QA questions only, here all that test_q.json holds are asked",
    "activitynet_qa_zero_shot": "lmms-eval's activitynetqa asks for a single word or phrase, here as in Video-LLaVA's"
    " script nothing is added to the question",
}

_OPEN = {
    task: Protocol(
        JUDGE_ACCURACY,
        "fraction",
        f"{entry.title}: {_PAPER}",
        "; ".join(text for text in (_DIFFERENCE, _OWN.get(task)) if text),
        split="test",
        judge="the one that python -m vzip judge is given; the protocol's is gpt-3.5-turbo",
        cluster="video_name",
        video=True,
    )
    for task, entry in VIDEO_SETS.items()
}

_LETTER = "\nAnswer with the option's letter from the given choices directly."
_DRAWN = "an answer in which no letter is found counts as one drawn by chance"
# MVBench's tasks, 200 questions each.
MVBENCH = (
    *("action_sequence", "action_prediction", "action_antonym", "fine_grained_action", "unexpected_action"),
    *("object_existence", "object_interaction", "object_shuffle", "moving_direction", "action_localization"),
    *("scene_transition", "action_count", "moving_count", "moving_attribute", "state_change", "fine_grained_pose"),
    *("character_order", "egocentric_navigation", "episodic_reasoning", "counterfactual_inference"),
)

_CHOICE = {
    "videomme_frames": Protocol(
        "videomme_perception_score",
        "percent",
        None,
        "frames alone, without subtitles, in lmms-eval's prompt, which speaks of subtitles all the same",
        split="test",
        prompt=_LETTER,
        chance=25.0,
        cluster="videoID",
        groups="duration",
        video=True,
    ),
    **{
        f"mvbench_{name}": Protocol(
            "mvbench_accuracy",
            "percent",
            None,
            "lmms-eval leaves empty answers out of the score",
            split=f"{name}/train",
            prompt="Only give the best option.\n",
            cluster="video",
            video=True,
        )
        for name in MVBENCH
    },
    "egoschema_subset": Protocol(
        "score",
        "fraction",
        None,
        f"the 500 questions whose answers are public; {_DRAWN}",
        split="Subset/test",
        prompt=_LETTER,
        chance=0.2,
        cluster="video_idx",
        video=True,
    ),
    "longvideobench_frames": Protocol(
        "lvb_acc",
        "fraction",
        None,
        f"the validation split, frames alone, without subtitles; {_DRAWN}",
        split="validation",
        prompt="Answer with the option's letter from the given choices directly.\n",
        cluster="video_id",
        groups="duration_group",
        video=True,
    ),
    "nextqa_mc_test": Protocol(
        "exact_match",
        "fraction",
        None,
        f"lmms-eval adds nothing to question and options; {_DRAWN}",
        split="MC/test",
        chance=0.2,
        cluster="video",
        video=True,
    ),
}

VIDEO: dict[str, Protocol] = {**_OPEN, **_CHOICE}
