"""Protocols of the video benchmarks (``video_qa.VIDEO_SETS``), the paper's Table 3.

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

VIDEO = {
    task: Protocol(
        JUDGE_ACCURACY,
        "fraction",
        f"{entry.title}: {_PAPER}",
        "; ".join(text for text in (_DIFFERENCE, _OWN.get(task)) if text),
        split="test",
        judge="the one that python -m vzip judge is given; the protocol's is gpt-3.5-turbo",
        cluster="video_name",
    )
    for task, entry in VIDEO_SETS.items()
}
