"""MathVista's testmini with lmms-eval's prompt and its comparison of answers, without the judge between them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

# lmms-eval makes its judge's client where it defines the evaluator; this kind needs no key and is never asked.
with mock.patch.dict(os.environ, {"API_TYPE": "dummy"}):
    from lmms_eval.tasks.mathvista.utils import (
        mathvista_doc_to_text as text,
    )
    from lmms_eval.tasks.mathvista.utils import (
        mathvista_doc_to_visual as visual,
    )
    from lmms_eval.tasks.mathvista.utils import (
        mathvista_evaluator,
    )

__all__ = ["results", "text", "visual"]


def results(doc: Mapping[str, Any], said: Sequence[str]) -> dict[str, float]:
    """Right or wrong, by lmms-eval's normalisation of the whole answer."""
    kind, choices = (doc["question_type"], doc["answer_type"]), doc["choices"]
    answer = said[0].strip()
    # The data set's column holds 1.0, which Python's round, that lmms-eval calls with it, does not take.
    precision = int(doc.get("precision") or 0)
    normalised = mathvista_evaluator.normalize_extracted_answer(answer, choices, *kind, precision)
    return {"accuracy": float(mathvista_evaluator.safe_equal(normalised, doc["answer"]))}
