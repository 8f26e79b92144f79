"""What lmms-eval calls for the scenes tasks; this file stands beside the generated pictures it opens."""

from pathlib import Path

from PIL import Image

from vzip.demo import scoring

FOLDER = Path(__file__).parent


def doc_to_visual(doc):
    with Image.open(FOLDER / doc["image"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    row = {"answer": doc["answer"], "said": scoring.normalise(results[0]), "pair": doc["pair"]}
    return {"f1": row, "accuracy": row, "mme": row}


def f1(rows):
    return scoring.f1(rows)


def accuracy(rows):
    return scoring.accuracy(rows)


def mme(rows):
    return scoring.mme(rows)
