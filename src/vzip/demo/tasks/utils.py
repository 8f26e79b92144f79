"""What lmms-eval calls for the scenes tasks; this file stands beside the generated images it opens."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vzip.demo import scoring

FOLDER = Path(__file__).parent


@lru_cache(maxsize=64)  # four questions are about an image
def opened(name: str) -> Image.Image:
    with Image.open(FOLDER / name) as image:
        return image.convert("RGB")


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [opened(doc["image"]).copy()]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return doc["question"]


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, scoring.Result]:
    row: scoring.Result = {"answer": doc["answer"], "said": scoring.normalise(results[0]), "pair": doc["pair"]}
    return {"f1": row, "accuracy": row, "mme": row}


def f1(rows: Sequence[scoring.Result]) -> float:
    return scoring.f1(rows)


def accuracy(rows: Sequence[scoring.Result]) -> float:
    return scoring.accuracy(rows)


def mme(rows: Sequence[scoring.Result]) -> float:
    return scoring.mme(rows)
