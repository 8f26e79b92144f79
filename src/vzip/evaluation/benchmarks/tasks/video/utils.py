"""What lmms-eval calls for the video benchmarks; this file is copied beside the questions."""

from collections.abc import Sequence
from typing import Any

from vzip.evaluation.benchmarks import video_qa


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    return [doc["video"]]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return doc["question"]  # Video-LLaVA's scripts add nothing to it


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return video_qa.offline_scores(doc["answer"], results[0])


def mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)
