"""Training data without a download: generated images, each with questions that are asked independently."""

from __future__ import annotations

import numpy as np

from vzip.data.collate import TrainingSample
from vzip.data.llava_record import IMAGE_PLACEHOLDER, Turn
from vzip.demo.questions import tuning_questions
from vzip.demo.render import render
from vzip.demo.scenes import TRAIN_SEEDS, Scene, sample_scene

# Within the training seeds, but beyond those that the built-in model itself was trained on.
FIRST_SEED = 1_500_000_000
SEEDS_A_SAMPLE = 16  # one in four shows no sign, so none of a sample's seeds does in 1 of 4 ** 16 cases


def scene_of(index: int) -> Scene:
    """The scene of a sample: as in the benchmark, one with things and a sign, of which fewer tokens leave least."""
    first = FIRST_SEED + SEEDS_A_SAMPLE * index
    scenes = (sample_scene(seed) for seed in range(first, first + SEEDS_A_SAMPLE))
    return next(scene for scene in scenes if scene.sign and scene.things)


class SceneDialogues:
    """Samples ``0 ... num_images - 1`` (``vzip.data.collate.TrainingSet``): a function of their number alone.

    Args:
        num_images: samples.
        num_questions: conversations of one question each, an image.
    """

    def __init__(self, num_images: int, num_questions: int) -> None:
        assert FIRST_SEED + SEEDS_A_SAMPLE * num_images <= TRAIN_SEEDS[1]
        self.num_images, self.num_questions = num_images, num_questions

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> TrainingSample:
        scene = scene_of(index)
        asked = tuning_questions(scene, np.random.RandomState(scene.seed ^ 0xD1A), self.num_questions)
        dialogues = [
            [Turn("user", f"{IMAGE_PLACEHOLDER}\n{question.text}"), Turn("assistant", question.answer)]
            for question in asked
        ]
        return TrainingSample(f"scene-{scene.seed}", [render(scene)], dialogues)

    @property
    def lengths(self) -> np.ndarray:
        """All alike."""
        return np.zeros(self.num_images, dtype=np.int64)

    @property
    def has_images(self) -> np.ndarray:
        """All."""
        return np.ones(self.num_images, dtype=bool)

    @property
    def image_groups(self) -> np.ndarray:
        """Each by itself: a sample has all questions about its image."""
        return np.arange(self.num_images)

    def describe(self) -> str:
        """What is trained on."""
        return f"{self.num_images:,} generated images, up to {self.num_questions} questions each"
