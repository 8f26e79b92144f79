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
    import pandas as pd
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    table = pd.DataFrame(list(entries))
    table["prediction"] = table["prediction"].astype(str)
    right = dict(zip(table["index"], table["answer"], strict=True))
    groups = table["index"] % ROTATIONS
    hits = {
        group: int(mmbench_evaluator.eval_sub_data(rotations, right, static_only=True))
        for group, rotations in table.sort_values("index").groupby(groups)
    }
    return [{"hit": hits[group], "group": int(group)} for group in groups]


def mmbench_groups(rows: Any) -> list[int]:
    """The number of each row's question, whichever its rotation."""
    return [index % ROTATIONS for index in rows["index"]]


def mme_pictures(rows: Any) -> list[tuple[str, str]]:
    """Each row's picture: its two questions count once more together (accuracy+)."""
    return list(zip(rows["category"], rows["question_id"], strict=True))


def mmmu_hits(entries: Entries) -> list[dict[str, Any]]:
    """``hit`` for each entry: 1 where lmms-eval counts the parsed answer as right.

    Args:
        entries: what lmms-eval's task wrote for each question under ``mmmu_acc``.
    """
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    verdicts, _ = evaluate_mmmu(entries)
    return [{"hit": int(verdicts[entry["id"]] == "Correct")} for entry in entries]
