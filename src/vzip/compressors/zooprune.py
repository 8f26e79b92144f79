"""ZOO-Prune: patches to which the projector is sensitive, unlike each other (github.com/AIM-SKKU/ZOO-Prune)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vzip.errors import ConfigError
from vzip.keys import POSITIVE, whole_number
from vzip.ops.attention import at_least_float32
from vzip.ops.select import cosine_matrix, farthest_first

from .base import ChosenUnits, check_seed
from .vision import Signal, VisionOutput


@dataclass(frozen=True)
class ZooPrune(ChosenUnits):
    """Keeps patches far from each other, by their sensitivity: how far a small step moves what the projector makes.

    A patch's sensitivity is the mean, over ``num_directions`` unit vectors drawn by ``seed`` and shared by all patches,
    of the distance between the projections a ``step`` this way and that, over twice the step; it is scaled to 0..1 over
    the crop. The first patch is the most sensitive, each next one has the greatest product of sensitivity and cosine
    distance of its projection to the nearest kept one. CLS is dropped, nothing is merged.

    All is float32 and seeded: as published, a half precision rounds most of such a step away, and no run is like
    another. For LLaVA-NeXT the published code projects by a stand-in made before weights are loaded; this is the
    model's own projector, at a cost of 2 * ``num_directions`` projections a crop. Where rows come projected from the
    tower (Qwen2.5-VL), all patches count as equally sensitive.

    Attributes:
        budget: tokens per crop.
        num_directions: vectors drawn.
        step: length of a step, in the tower's space.
        seed: of the vectors.

    Raises:
        ConfigError: a value that is not allowed.
    """

    space: ClassVar[Literal["tower", "projected"]] = "projected"
    cannot_capture: ClassVar[str | None] = "it draws its directions by a generator"

    num_directions: int = 64
    step: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rule in (("num_directions", whole_number(1)), ("step", POSITIVE)):
            if not rule.allows(vars(self)[name]):
                raise ConfigError(f"compressor.{name}={vars(self)[name]!r}: must be {rule.text}.")
        check_seed(self.seed)

    @torch.no_grad()  # or the graph of every step would be held
    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        rows = at_least_float32(vision.read_patches(Signal("hidden")))
        if vision.project is None:
            projected, weight = rows, torch.ones_like(rows[:, :, 0])
        else:
            project = in_float32(vision.project)
            projected, weight = project(rows), self._sensitivity(rows, project)
            low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
            weight = (weight - low) / (high - low).clamp(min=torch.finfo(weight.dtype).tiny)
        kept = farthest_first(1 - cosine_matrix(projected), weight.argmax(dim=1), num_tokens, weight)
        return kept + int(vision.has_cls)

    def _sensitivity(self, rows: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """``[N, P]``."""
        drawn = torch.randn(self.num_directions, rows.shape[2], generator=torch.Generator().manual_seed(self.seed))
        steps = nn.functional.normalize(drawn, dim=1).to(rows.device, rows.dtype, non_blocking=True) * self.step
        total = torch.zeros_like(rows[:, :, 0])
        for step in steps:  # one after the other: together they would hold as many projections of all patches
            total = total + (project(rows + step) - project(rows - step)).norm(dim=2)
        return total / (2 * self.step * self.num_directions)


def in_float32(project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The projector, or a copy in float32 where its weights are of half precision."""
    if isinstance(project, nn.Module) and any(at_least_float32(p) is not p for p in project.parameters()):
        return copy.deepcopy(project).float()
    return project
