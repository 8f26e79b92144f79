"""What an image of a scene shows, in the forms that the tower learns from: patch by patch, and in one sentence."""

from __future__ import annotations

import numpy as np

from vzip.demo.render import CHARACTERS, shape_mask
from vzip.demo.scenes import COLORS, LETTER_PITCH, SHAPES, SIGN_MARGIN, WORDS, Scene, Sign, Thing

# What a patch shows: 0 background, then every (shape, colour, size), then every text a sign can carry.
NUM_THING_LABELS = len(SHAPES) * len(COLORS) * 2
TEXTS = (*WORDS, *(str(n) for n in range(10, 100)))
NUM_PATCH_LABELS = 1 + NUM_THING_LABELS + len(TEXTS)


def thing_label(thing: Thing) -> int:
    """Label of a thing in `patch_labels`, from 1."""
    pair = SHAPES.index(thing.shape) * len(COLORS) + tuple(COLORS).index(thing.color)
    return 1 + pair * 2 + (thing.size == "large")


def sign_label(sign: Sign) -> int:
    """Label of a sign's text in `patch_labels`."""
    return 1 + NUM_THING_LABELS + TEXTS.index(sign.text)


def patch_labels(scene: Scene, patch: int = 14, least: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """What every patch shows: (labels, characters), each [rows, columns].

    A patch has the label that covers most of it, if that covers at least `least` of its area; `characters` is the
    letter of a sign most of which it shows (1 + index in CHARACTERS), 0 elsewhere.
    """
    rows = scene.canvas // patch
    best = np.full((rows, rows), least * patch * patch)
    labels, characters = np.zeros((rows, rows), dtype=np.int64), np.zeros((rows, rows), dtype=np.int64)

    def cover(out: np.ndarray, best: np.ndarray, label: int, left: int, top: int, mask: np.ndarray) -> None:
        side = rows * patch
        pixels = np.zeros((side, side), dtype=bool)
        pixels[top : top + mask.shape[0], left : left + mask.shape[1]] = mask[: side - top, : side - left]
        area = pixels.reshape(rows, patch, rows, patch).sum(axis=(1, 3))
        out[area > best] = label
        np.maximum(best, area, out=best)

    for thing in scene.things:
        mask = shape_mask(thing.shape, thing.edge) > 0
        cover(labels, best, thing_label(thing), thing.left, thing.top, mask)
    if scene.sign:
        sign = scene.sign
        plate = np.ones((sign.height, sign.width), dtype=bool)
        cover(labels, best, sign_label(sign), sign.left, sign.top, plate)
        most = np.full((rows, rows), least * patch * patch)
        cell = np.ones((sign.height, LETTER_PITCH), dtype=bool)
        for number, character in enumerate(sign.text):
            left = sign.left + SIGN_MARGIN + number * LETTER_PITCH
            cover(characters, most, 1 + CHARACTERS.index(character), left, sign.top, cell)
    return labels, characters


def caption(scene: Scene) -> str:
    """One sentence that names everything in the scene."""
    parts = []
    for thing in scene.things:
        place = scene.quarter(thing)
        parts.append(f"a {thing.size} {thing.name}" + (f" at the {place}" if place else ""))
    if scene.sign:
        parts.append(f"a sign that says {scene.sign.text.lower()}")
    return ", ".join(parts)
