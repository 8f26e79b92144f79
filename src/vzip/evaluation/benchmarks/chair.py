"""CHAIR with lmms-eval's own functions, and its share of hallucinated objects turned round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.tasks.coco_cap_chair.utils import (
    coco_cap_chair_aggregate_results_chair_i,
    coco_cap_chair_process_result,
)


def results(doc: Mapping[str, Any], said: Sequence[str]) -> dict[str, Any]:
    """What lmms-eval reads of a caption, also under the metric that is new here."""
    read = coco_cap_chair_process_result(doc, said)
    return {"chair_objects_there": read["coco_cap_chair_i"]} | read


def objects_there(entries: Sequence[Mapping[str, Any]]) -> float:
    """Percent of the objects named in captions that are in the image; 0 where none is named at all."""
    return 100 - coco_cap_chair_aggregate_results_chair_i(entries) if any(entry["pred"] for entry in entries) else 0.0
