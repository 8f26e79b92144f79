"""What the task files of ``tasks/image`` add to lmms-eval's: the paper's scores where lmms-eval's are others.

Answers are read by lmms-eval's own code; here they are only put together in another way, or other images are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score, pope_process_results
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
from lmms_eval.tasks.seedbench.utils import seed_doc_to_visual

from vzip.evaluation.benchmarks.judged import JUDGE_CONTEXT

Doc = Mapping[str, Any]


def pope_results(doc: Doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """lmms-eval's reading of the answer under every metric of the task, with the split and the image added."""
    read = pope_process_results(doc, results)["pope_f1_score"]
    entry = read | {"split": doc["category"], "image": doc["image_source"]}
    return dict.fromkeys(("pope_f1_mean", "pope_f1_score", "pope_accuracy"), entry)


def pope_mean_of_splits(entries: Sequence[Mapping[str, Any]]) -> float:
    """Mean of the splits' F1, as the paper has it; splits without a question (a limited run) are left out."""
    by_split: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_split.setdefault(entry["split"], []).append(entry)
    return sum(pope_aggregate_f1_score(split) for split in by_split.values()) / len(by_split)


def scienceqa_questions(dataset: Any) -> Any:
    """All questions, with ``has_image`` added: lmms-eval shows the scorer a question without its image."""
    images = dataset.select_columns("image").with_format("arrow")[:]["image"]
    return dataset.add_column("has_image", images.is_valid().to_pylist())


def scienceqa_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Right or wrong, for all questions and once more for those with an image."""
    score = sqa_process_results(doc, results)["exact_match"]
    return {"exact_match": score} | ({"exact_match_image": score} if doc["has_image"] else {})


def seed_middle_frame(doc: Doc) -> list[Any]:
    """The image of a question, or the middle one of the frames of a video, which is all that LLaVA's script shows."""
    images = seed_doc_to_visual(doc)
    return [images[len(images) // 2]]


def seed_images_only(dataset: Any) -> Any:
    """The questions about images."""
    return dataset.filter(lambda kind: kind == "image", input_columns=["data_type"])


def ocrbench_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """lmms-eval's reading of the answer as one number a question.

    Its own score is the sum over 1000, however few questions were asked, and has no standard error.
    """
    return {"ocrbench_accuracy": float(ocrbench_process_results(doc, results)["ocrbench_accuracy"]["score"])}


def mmvet_image(doc: Doc) -> list[Any]:
    """The image of a question."""
    return [doc["image"].convert("RGB")]


def answered(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Whether there is an answer at all; what it is worth a judge says after the run."""
    return {"answered": float(bool(results[0].strip()))}


def llava_bench_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """The same, and what the judge is told of the image."""
    captions = doc["caption"]
    context = captions if isinstance(captions, str) else "\n".join(captions)
    return answered(doc, results) | {JUDGE_CONTEXT: {"context": context, "category": doc["category"]}}
