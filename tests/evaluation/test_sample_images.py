"""Images of lmms-eval's questions, opened again: the right ones, and none of another data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vzip.errors import ImageError, ManifestError
from vzip.evaluation.sample_images import sample_images

TASK = """
task: looked_at
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.json}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function looked_at.image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CODE = """
from PIL import Image
def image(doc):
    return [Image.new("RGB", (doc["side"], 7), "white")] if doc["side"] else ["film.mp4"]
"""


def test_the_image_is_that_of_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"question": f"q{n}", "answer": "yes", "side": side} for n, side in enumerate((3, 5, 0))]
    (tmp_path / "questions.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "looked_at.py").write_text(CODE)
    (tmp_path / "looked_at.yaml").write_text(TASK.format(folder=tmp_path))
    images = sample_images("looked_at", tmp_path)
    for number, side in enumerate((3, 5)):
        (image,) = images({"doc_id": number, "question": f"q{number}"})
        assert isinstance(image, Image.Image) and image.size == (side, 7)
    for row, told in (
        ({"doc_id": 1, "question": "q0"}, "another text"),
        ({"doc_id": 9, "question": "q9"}, "no question 9"),
        ({"doc_id": 2, "question": "q2"}, "is about a video"),
    ):
        with pytest.raises(ImageError, match=told):
            images(row)


def test_data_that_is_not_here_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "looked_at.py").write_text(CODE)
    remote = TASK.replace("dataset_path: json", "dataset_path: nobody/has-this").replace("dataset_kwargs", "metadata")
    (tmp_path / "looked_at.yaml").write_text(remote.format(folder=tmp_path))
    with pytest.raises(ManifestError, match="looked_at"):
        sample_images("looked_at", tmp_path)
