"""The part of a LLaVA-format file that is trained on, every picture known to be there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import get_args

import numpy as np
from rich.console import Console

from vzip.errors import ConfigError, ManifestError

from .collate import TrainingSample
from .llava_json import LlavaJson, OnProblem
from .subset import choose, source_table

_NUM_SHOWN = 10


class LlavaSet:
    """Samples of a LLaVA-format file (``vzip.data.collate.TrainingSet``).

    Args:
        path, image_root: the file and the folder its picture paths start from.
        fraction, seed, keep_text_only: which part, see ``vzip.data.subset``.
        on_problem: what becomes of missing pictures and broken records: ``refuse`` or ``skip``.
        cache: folder of the file's index.

    Raises:
        ManifestError: an unreadable file; with ``refuse``, broken records or missing pictures.
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
        there = np.array([self._has_files(int(index)) for index in chosen])
        self.num_missing = int((~there).sum())
        if self.num_missing and on_problem == "refuse":
            raise ManifestError(self._refusal(chosen[~there]))
        self._chosen = chosen[there]
        if not len(self._chosen):
            raise ManifestError(f"{self.records.path}: no sample is left, all {len(chosen)} lack their pictures.")

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> TrainingSample:
        sample = self.records[int(self._chosen[index])]
        return TrainingSample(sample.id, sample.images, [sample.turns])

    @property
    def lengths(self) -> np.ndarray:
        """Words: int32 ``[samples]``."""
        return self.records.lengths[self._chosen]

    @property
    def has_images(self) -> np.ndarray:
        """bool ``[samples]``."""
        return self.records.num_images[self._chosen] > 0

    def describe(self) -> str:
        """What is trained on, by source, and what was left out."""
        console = Console(file=io.StringIO(), width=100)
        console.print(source_table(self.records, self._chosen))
        if self.num_missing or self.records.num_skipped:
            num_broken = self.records.num_skipped
            console.print(f"left out: {self.num_missing} samples without their pictures, {num_broken} broken records")
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]  # it is the StringIO above

    def _has_files(self, index: int) -> bool:
        if not self.records.has_images(index):
            return True
        return all(image.is_file() for image in self.records[index].images)

    def _refusal(self, missing: np.ndarray) -> str:
        samples = [self.records[int(index)] for index in missing[:_NUM_SHOWN]]
        lines = [f"{self.records.path}: {len(missing)} samples lack a picture below {self.records.image_root}:"]
        lines += [f"  {sample.id}: {next(i for i in sample.images if not i.is_file())}" for sample in samples]
        lines += [f"  ... and {len(missing) - len(samples)} more"] if len(missing) > len(samples) else []
        lines.append(
            "Download them (`python -m vzip data verify` names them all), mend data.image_root, or leave these samples"
            " out with data.on_problem=skip."
        )
        return "\n".join(lines)
