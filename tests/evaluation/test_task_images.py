"""The images of tasks by themselves, from a task of one's own; without a network an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vzip.errors import ConfigError, ManifestError
from vzip.evaluation.task_images import open_tasks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
UTILS = """
from PIL import Image
def image(doc):
    if doc["color"] == "clip":
        return ["video.mp4"]
    return [Image.open(doc["color"])] if doc["color"].endswith("png") else [Image.new("RGB", (8, 8), doc["color"])]
"""


def tasks(folder: Path, **colors: list[str]) -> str:
    (folder / "utils.py").write_text(UTILS)
    for name, own in colors.items():
        questions = folder / f"{name}.json"
        questions.write_text("".join(json.dumps({"question": "?", "answer": "a", "color": c}) + "\n" for c in own))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, questions=questions))
    return str(folder)


def test_every_image_once_in_order(tmp_path, caplog):
    cut = str(tmp_path / "cut.png")
    Path(cut).write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("L", (4, 4), 9).save(tmp_path / "grey.png")
    grey = str(tmp_path / "grey.png")
    folder = tasks(tmp_path, seen_one=["red", "red", grey, cut, "blue"], seen_two=["blue", "lime"])
    found = list(open_tasks(["seen_one", "seen_two"], folder))
    assert [name for name, _ in found] == [
        "seen_one, question 0",
        "seen_one, question 2",
        "seen_one, question 4",
        "seen_two, question 1",
    ]
    assert "left out: task seen_one, question 3: " in caplog.text
    assert [image.getpixel((0, 0)) for _, image in found] == [(255, 0, 0), (9, 9, 9), (0, 0, 255), (0, 255, 0)]


def test_a_task_of_videos_is_refused(tmp_path):
    images = open_tasks(["of_videos"], tasks(tmp_path, of_videos=["red", "clip"]))
    assert next(images)[0] == "of_videos, question 0"
    with pytest.raises(ConfigError, match="task of_videos, question 1 shows something else"):
        next(images)


def test_without_a_network_it_is_an_error():
    with pytest.raises(ManifestError, match="textvqa_val"):  # HF_HUB_OFFLINE=1, as in all tests
        open_tasks(["textvqa_val"], None)
