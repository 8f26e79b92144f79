"""What lmms-eval's benchmarks do not say of each question: whether it is right, and which are scored together.

MMBench and MMMU are judged by lmms-eval inside the aggregation over all questions. A comparison of two runs question by
question needs the verdicts themselves, so the same code of lmms-eval is asked once more and what it says is kept beside
the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Entries = Sequence[Mapping[str, Any]]
# MMBench numbers the k-th rotation of question i as i + k * 10^6.
ROTATIONS = 10**6


def mmbench_hits(entries: Entries) -> list[dict[str, Any]]:
    """``hit`` and ``group`` for each entry: a question counts where all rotations of its options are answered rightly.

    Args:
        entries: what lmms-eval's task wrote for each question under ``gpt_eval_score``.

    Returns:
        One dict an entry, in their order; rotations of one question share the group and the hit.
    """
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    right = {entry["index"]: entry["answer"] for entry in entries}
    groups: dict[int, _Rows] = {}
    for entry in sorted(entries, key=lambda entry: entry["index"]):
        groups.setdefault(entry["index"] % ROTATIONS, _Rows()).append(entry)
    hits = {
        group: int(mmbench_evaluator.eval_sub_data(rotations, right, static_only=True))
        for group, rotations in groups.items()
    }
    return [{"hit": hits[group], "group": group} for group in (entry["index"] % ROTATIONS for entry in entries)]


class _Rows(list[Mapping[str, Any]]):
    """A list for code that wants a pandas table and asks for nothing but its length and its rows, a thousandfold."""

    @property
    def iloc(self) -> _Rows:
        return self


def mmbench_groups(rows: Any) -> list[int]:
    """The number of each row's question, whichever its rotation."""
    return [index % ROTATIONS for index in rows["index"]]


def mme_images(rows: Any) -> list[tuple[str, str]]:
    """Each row's image: its two questions count once more together (accuracy+)."""
    return list(zip(rows["category"], rows["question_id"], strict=True))


def mmmu_hits(entries: Entries) -> list[dict[str, Any]]:
    """``hit`` for each entry: 1 where lmms-eval counts the parsed answer as right.

    Args:
        entries: what lmms-eval's task wrote for each question under ``mmmu_acc``.
    """
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    verdicts, _ = evaluate_mmmu(entries)
    return [{"hit": int(verdicts[entry["id"]] == "Correct")} for entry in entries]


def box_hits(entries: Entries) -> list[dict[str, Any]]:
    """``hit`` for each entry of RefCOCO: 1 where the boxes overlap by half, as lmms-eval computes it.

    Args:
        entries: what lmms-eval's task wrote for each question under ``refcoco_ACC@0.5``.
    """
    from lmms_eval.tasks.refcoco.utils_rec import compute_accuracy

    return [{"hit": int(compute_accuracy(entry["bbox"], entry["pred"], 0.5))} for entry in entries]


def pixel_box_hits(entries: Entries) -> list[dict[str, Any]]:
    """The same of the tasks whose boxes are in pixels (``refcoco_grounding_ACC@0.5``)."""
    from lmms_eval.tasks.refcoco_grounding.utils import refcoco_grounding_acc05

    return [{"hit": int(refcoco_grounding_acc05([entry]))} for entry in entries]


def answer_hits(entries: Entries) -> list[dict[str, Any]]:
    """``hit`` for each entry of HallusionBench: 1 where lmms-eval's rule reads the right answer."""
    from lmms_eval.tasks.hallusion_bench.evaluate_hb import hb_aggregation_result_aAcc_intern

    return [{"hit": int(hb_aggregation_result_aAcc_intern([dict(entry)]))} for entry in entries]
