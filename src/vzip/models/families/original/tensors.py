"""Reading weight files without loading them: tensors stay on disk until they are copied into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vzip.errors import CheckpointError

from ...hub import READ_ERRORS, shards_of
from .names import UnexpectedName

# In order of preference; a directory may hold both formats.
CHECKPOINT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def weight_files(directory: Path, names: Sequence[str]) -> list[Path]:
    """The files that hold a directory's weights: the first of ``names`` that is there, or the shards it lists.

    Raises:
        CheckpointError: none is there, an index cannot be read, or a shard it names is missing.
    """
    found = next((directory / name for name in names if (directory / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{directory}: holds no weights; one of {', '.join(names)} is needed.")
    if found.suffix != ".json":
        return [found]
    shards = sorted(shards_of(found))
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(shards)} weight files are missing ({', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}); {found.name} names them. Download them again."
        )
    return [directory / name for name in shards]


def renamed_tensors(files: Sequence[Path], rename: Callable[[str], str | None], family: str) -> dict[str, Tensor]:
    """All tensors of the files under their new names, without those that ``rename`` gives no name.

    Args:
        files: from ``weight_files``.
        rename: raises UnexpectedName for a tensor that has no place.
        family: for messages.

    Raises:
        CheckpointError: tensors that ``rename`` does not know, all of them named.
    """
    tensors: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file in files:
        for name, tensor in _tensors_in(file):
            try:
                new_name = rename(name)
            except UnexpectedName:
                unexpected.append(name)
                continue
            if new_name is not None:
                tensors[new_name] = tensor
    if unexpected:
        raise CheckpointError(
            f"{files[0].parent}: {len(unexpected)} tensors belong to no part of {family}"
            f" ({', '.join(unexpected[:4])}{', ...' if len(unexpected) > 4 else ''}). The checkpoint is of another"
            " architecture."
        )
    return tensors


def names_in(file: Path) -> list[str]:
    """The names of a file's tensors; none of a file of settings (``.json``)."""
    if file.suffix == ".json":
        return []
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    return [name for name, _ in _tensors_in(file)]


def _tensors_in(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Raises CheckpointError for a file that cannot be read, or that holds something else than named tensors."""
    try:
        for name, tensor in _read(file):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name!s:.80} is a {type(tensor).__name__}, not a tensor")
            yield name, tensor
    except READ_ERRORS as error:
        said = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"{file}: cannot be read as weights ({type(error).__name__}: {said[0]}). It is cut short, damaged or of"
            " another program: copy or download it again."
        ) from error


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield name, opened.get_tensor(name)
        return
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    yield from state.items()


def _can_be_mapped(file: Path) -> bool:
    """Whether a ``.bin`` is in torch's zip format; the one before torch 1.6 has to be read whole."""
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"
