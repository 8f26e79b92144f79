"""Tuned weights put into a model that vLLM loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vzip.errors import CheckpointError, ConfigError
from vzip.models.weights.tuned import checked_tensors, embedding_rows, read_header, same_numbers, written

from . import ARCHITECTURES


@dataclass(frozen=True)
class TunedProjector:
    """A directory that ``train.py`` wrote.

    Attributes:
        directory: where it is on this machine.
        header: from its ``tuned.json``.
    """

    directory: Path
    header: dict[str, Any]

    @classmethod
    def read(cls, source: str, architecture: str) -> TunedProjector:
        """Reads the header alone.

        Args:
            source: a directory or hub id.
            architecture: of ours, that it will be served with.

        Raises:
            CheckpointError: not such a directory, or tuned from a model of another class.
            ConfigError: LoRA layers were tuned too.
        """
        directory, header = read_header(source)
        if "lora_sha256" in header:
            raise ConfigError(
                f"vzip.projector={source}: LoRA layers were tuned with it, which are not put into a server one by one:"
                f" `python -m vzip merge {source} --out DIR`, and serve DIR."
            )
        if ARCHITECTURES.get(model_class := header["base"]["model_class"]) != architecture:
            raise CheckpointError(
                f"vzip.projector={source}: tuned from a {model_class}, and {architecture} is to be served."
            )
        return cls(directory, header)

    def tensors(self) -> dict[str, Tensor]:
        """By Hugging Face's names; raises CheckpointError if they are not as they were written."""
        return checked_tensors(self.directory, self.header)

    def of_base(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights of a checkpoint as they pass; raises CheckpointError if it is not the base it was tuned from."""
        base, same = self.header["base"], False
        for name, tensor in weights:
            if name.endswith("embed_tokens.weight"):
                probe = written(embedding_rows(tensor))
                same = same_numbers(probe, base["probe"][: len(probe)])
            yield name, tensor
        if not same:
            raise CheckpointError(
                f"{self.directory}: tuned from {base['name_or_path']} (revision {base['revision']}), and the model"
                " served is another one: its text embedding is not the same."
            )
