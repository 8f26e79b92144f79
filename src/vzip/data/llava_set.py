"""The part of a LLaVA-format file that is trained on, every image known to be there."""

from __future__ import annotations

import functools
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import get_args

import numpy as np
from rich.console import Console

from vzip.errors import ConfigError, ManifestError

from .collate import TrainingSample
from .llava_json import LlavaJson, OnProblem
from .subset import choose, source_table
from .verify import find_problems

_NUM_SHOWN = 10


class LlavaSet:
    """Samples of a LLaVA-format file (``vzip.data.collate.TrainingSet``).

    Args:
        path, image_root: the file and the folder its image paths start from.
        fraction, seed, keep_text_only: which part, see ``vzip.data.subset``.
        on_problem: what becomes of missing (or empty) images and broken records: ``refuse`` or ``skip``.
        cache: folder of the file's index.

    Raises:
        ManifestError: an unreadable file; with ``refuse``, broken records or missing images.
        ConfigError: nothing left to train on.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        *,
        fraction: float | str = 1.0,
        seed: int = 0,
        keep_text_only: bool = True,
        on_problem: OnProblem = "refuse",
        cache: str | Path | None = None,
    ) -> None:
        if on_problem not in get_args(OnProblem):
            raise ConfigError(f"data.on_problem={on_problem}: must be one of {', '.join(get_args(OnProblem))}.")
        self.records = LlavaJson(path, image_root, on_problem=on_problem, cache=cache)
        chosen = choose(self.records, fraction, seed, keep_text_only=keep_text_only)
        reasons = {p.image.name: p.reason for p in find_problems(self.records, chosen, decode=False)}
        lacking = self._naming(reasons, chosen)
        self.num_missing = int(lacking.sum())
        if self.num_missing and on_problem == "refuse":
            raise ManifestError(self._refusal(chosen[lacking], reasons))
        self._chosen = chosen[~lacking]
        if not len(self._chosen):
            raise ManifestError(f"{self.records.path}: no sample is left, all {len(chosen)} lack their images.")

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> TrainingSample:
        sample = self.records[int(self._chosen[index])]
        return TrainingSample(sample.id, sample.images, [sample.turns], sample.videos)

    @property
    def lengths(self) -> np.ndarray:
        """Words: int32 ``[samples]``."""
        return self.records.lengths[self._chosen]

    @property
    def has_images(self) -> np.ndarray:
        """bool ``[samples]``."""
        return self.records.num_images[self._chosen] > 0

    @functools.cached_property
    def image_groups(self) -> np.ndarray:
        """Samples about the same files have the same number, each one without any its own: int64 ``[samples]``."""
        numbers: dict[object, int] = {}
        # Every record is read: the index does not tell their files.
        files = (self.records.record(int(index)).files for index in self._chosen)
        return np.array([numbers.setdefault(own or index, len(numbers)) for index, own in enumerate(files)])

    def describe(self) -> str:
        """What is trained on, by source, and what was left out."""
        console = Console(file=io.StringIO(), width=100)
        console.print(source_table(self.records, self._chosen))
        if self.num_missing or self.records.num_skipped:
            num_broken = self.records.num_skipped
            console.print(f"left out: {self.num_missing} samples without their images, {num_broken} broken records")
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]  # it is the StringIO above

    def _naming(self, images: Collection[str], indices: np.ndarray) -> np.ndarray:
        """Which of the samples name one of the images: bool, as long as ``indices``."""
        if not images:  # the usual case; otherwise every record is read again
            return np.zeros(len(indices), dtype=bool)
        return np.array([any(name in images for name in self.records.record(int(i)).files) for i in indices])

    def _refusal(self, indices: np.ndarray, reasons: Mapping[str, str]) -> str:
        lines = [f"{self.records.path}: {len(indices)} samples lack an image below {self.records.image_root}:"]
        for index in map(int, indices[:_NUM_SHOWN]):
            record = self.records.record(index)
            reason = next(reasons[name] for name in record.files if name in reasons)
            lines.append(f"  {record.label(index)}: {reason}")
        lines += [f"  ... and {len(indices) - _NUM_SHOWN} more"] if len(indices) > _NUM_SHOWN else []
        lines.append(
            "Download them (`python -m vzip data verify` names them all), mend data.image_root, or leave these samples"
            " out with data.on_problem=skip."
        )
        return "\n".join(lines)
