"""What each benchmark's number means: metric, unit, chance, and how it differs from the paper's number.

Facts about lmms-eval are those of 0.7.3's task files; about the paper, of arXiv 2412.04467 and LLaVA's scripts. Metric
keys are lmms-eval's; a key of the form ``a+b`` is the sum of two.
"""

from __future__ import annotations

from .image_protocols import IMAGE
from .protocol import Protocol
from .video_protocols import VIDEO

__all__ = ["PROTOCOLS", "Protocol", "protocol_of"]

# The built-in benchmark. Chance is the best blind strategy: it knows the questions and how often each answer is right,
# never an image. existence: always yes; counting: a fair coin (a constant answer never gets both twins); the others:
# the commonest answer to each kind of question.
_SCENES = {
    "scenes_existence": Protocol("f1", "percent", None, chance=200 / 3),
    "scenes_attributes": Protocol("accuracy", "percent", None, chance=32.25),
    "scenes_counting": Protocol("mme", "percent", None, chance=37.5, cluster="pair"),
    "scenes_reading": Protocol("accuracy", "percent", None, chance=3.75),
}

PROTOCOLS: dict[str, Protocol] = {**IMAGE, **VIDEO, **_SCENES}


def protocol_of(task: str) -> Protocol | None:
    """The protocol of a known benchmark, or None for a task of one's own."""
    return PROTOCOLS.get(task)
