"""Images of the page: small, each once, in the order of what is worth looking at."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from vzip.analysis.overlay import Crop
from vzip.errors import ImageError
from vzip.report.view.pictures import MOST_IMAGES, SIDE, add_pictures


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def content_of(*outcomes: str) -> dict[str, Any]:
    return {
        "samples": [{"outcome": one, "question": f"q{n}", "views": [], "note": ""} for n, one in enumerate(outcomes)]
    }


def test_each_image_is_there_once_and_is_small() -> None:
    shown = {0: picture(0, (4000, 1000)), 1: picture(0, (4000, 1000)), 2: picture(2)}
    content = content_of("right", "right", "right")
    assert add_pictures(content, [{"n": n} for n in range(3)], lambda row: [shown[row["n"]]], [None], 10) == 3
    assert [one["views"][0]["image"] for one in content["samples"]] == [0, 0, 1]
    sizes = []
    for entry in content["images"]:
        kind, _, data = entry["src"].partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (entry["width"], entry["height"]) and max(image.size) <= SIDE
            sizes.append(image.size)
    assert sizes == [(SIDE, SIDE // 4), (40, 30)]


def test_a_limit_leaves_out_what_is_least_worth_looking_at_and_says_so() -> None:
    content = content_of("right", "wrong", "lost", "gained", "right")
    assert add_pictures(content, [{}] * 5, lambda row: [picture(1)], [None], 3) == 3
    assert [bool(one["views"]) for one in content["samples"]] == [False, True, True, True, False]
    assert content["samples"][0]["note"] == "The image was left out: --limit 3."


def test_an_image_that_is_not_there_is_told_and_ends_nothing() -> None:
    def source(row: dict[str, Any]) -> list[Image.Image]:
        if row["n"] == 0:
            raise ImageError("gone")
        return [picture(n) for n in range(MOST_IMAGES + 2)]

    content = content_of("lost", "lost")
    assert add_pictures(content, [{"n": 0}, {"n": 1}], source, [None], 9) == 1
    first, second = content["samples"]
    assert first["note"] == "The image is not at hand: gone" and not first["views"]
    assert len(second["views"]) == MOST_IMAGES and f"The first {MOST_IMAGES} of {MOST_IMAGES + 2}" in second["note"]


def test_a_method_that_fails_leaves_the_image_without_its_overlay() -> None:
    def keeper(image: Image.Image, question: str) -> Crop:
        raise ImageError("too oblong")

    content = content_of("lost")
    assert add_pictures(content, [{}], lambda row: [picture(1)], [keeper], 9) == 1
    assert content["samples"][0]["views"] == [{"image": 0, "kept": [None]}]
    assert content["samples"][0]["note"] == "Kept patches are not drawn: too oblong"


class Keeper:
    def __init__(self, reads_text: bool) -> None:
        self.reads_text = reads_text
        self.asked: list[str] = []

    def __call__(self, image: Image.Image, question: str) -> Crop:
        self.asked.append(question)
        kept = np.array([[True, False, False], [False, False, True]])
        return Crop(image, kept, np.array([[-1, 0, 1], [-1, 0, -1]]), [4, -1])


def test_kept_patches_are_computed_once_an_image_and_of_text_aware_methods_once_a_question() -> None:
    for reads_text, asked in ((False, ["q0"]), (True, ["q0", "q1"])):
        keeper, content = Keeper(reads_text), content_of("lost", "lost")
        add_pictures(content, [{}, {}], lambda row: [picture(1)], [keeper, None], 9)
        assert keeper.asked == asked
        kept, none = content["samples"][0]["views"][0]["kept"]
        assert none is None and kept["image"] == 0 and len(content["images"]) == 1
        assert (kept["grid"], kept["kept"], kept["groups"]) == ([2, 3], [0, 5], [[4, [1, 4]], [-1, [2]]])
