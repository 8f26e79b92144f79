"""What training changed, in a file of its own: the tuned weights, and from what they were made.

``tuned.safetensors`` holds the trained tensors under the model's own names, ``tuned.json`` says for which base model,
compressor and budget. Loading holds all of that against the model at hand. LoRA layers that were trained with them are
in ``lora``, a PEFT checkpoint, and come along.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from vzip.compressors.base import Compressor
from vzip.errors import CheckpointError
from vzip.json_files import read_json
from vzip.paths import expanded, is_file, is_folder, shown

from ..families import Adapter
from ..hub import TUNED_HEADER, TUNED_LORA, Checkpoint, is_hub_id
from .digests import DIGESTS_NAME, check_digests, sha256, write_digests
from .lora import apply_peft_checkpoint
from .lora_training import WEIGHTS_NAME as LORA_WEIGHTS_NAME
from .lora_training import is_lora, read_lora, write_lora

logger = logging.getLogger(__name__)

WEIGHTS_NAME, HEADER_NAME, LORA_NAME = "tuned.safetensors", TUNED_HEADER, TUNED_LORA
FORMAT = "vzip-tuned-1"
_HEADER: dict[str, Any] = {"base": dict, "compressor": str, "sha256": str}
_BASE: dict[str, Any] = {
    "name_or_path": (str, type(None)),
    "revision": (str, type(None)),
    "model_class": str,
    "probe": list,
}


def base_probe(adapter: Adapter) -> list[float]:
    """A few of the base model's numbers, by which it is known again whatever its path and precision.

    Read from what quantization leaves alone: the text embedding and the language model's and tower's norms.
    """
    weight = adapter.embed_tokens.weight
    assert isinstance(weight, Tensor)
    taken = embedding_rows(weight)
    tuned = {id(parameter) for parameter in adapter.projector.parameters()}  # some towers hold it
    for module in (adapter.vision_tower, adapter.language_model):
        norms = [parameter for parameter in module.parameters() if parameter.ndim == 1 and id(parameter) not in tuned]
        taken += [norms[index][:4] for index in np.linspace(0, len(norms) - 1, 8).astype(int)]
    return written(taken)


def embedding_rows(weight: Tensor) -> list[Tensor]:
    """What ``base_probe`` begins with, of the text embedding."""
    return [weight[row, :8] for row in (1, weight.shape[0] // 2, weight.shape[0] - 1)]


def written(taken: Iterable[Tensor]) -> list[float]:
    """Numbers as a header has them."""
    return [float(f"{value:.6g}") for values in taken for value in values.detach().float().cpu().tolist()]


def same_numbers(probe: list[float], of_base: list[float]) -> bool:
    """Whether they are the same in some precision."""
    return len(probe) == len(of_base) and bool(np.allclose(probe, of_base, rtol=0.02, atol=1e-4))


def describe(
    adapter: Adapter,
    compressor: Compressor,
    name_or_path: str,
    revision: str | None,
    parts: list[str],
    loaded_lora: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The header of a run's tuned weights; the caller adds step and commit.

    Args:
        adapter: of the base model, before anything is trained.
        compressor: what it is trained with.
        name_or_path, revision: where the base model is loaded from.
        parts: what trains.
        loaded_lora: LoRA layers under it that do not train (``CompressedVlm.lora``), or None.
    """
    return {
        "format": FORMAT,
        "base": {
            "name_or_path": name_or_path,
            "revision": revision,
            "model_class": type(adapter.model).__name__,
            "probe": base_probe(adapter),
        },
        "compressor": repr(compressor),
        "parts": parts,
        **({} if loaded_lora is None else {"loaded_lora": dict(loaded_lora)}),
    }


def tuned_with(header: Mapping[str, Any]) -> list[str]:
    """The compressor that a header tells of, with its budget; each of those of a training for several budgets."""
    return header.get("compressors") or [header["compressor"]]


def save_tuned(directory: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes both files in one step: a crash leaves what was there, or all of the new.

    Raises:
        CheckpointError: they cannot be written (a full disk).
    """
    with atomic_directory(directory) as work:
        write_tuned(work, tensors, header)
        write_digests(work)


def write_tuned(directory: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes both files, and LoRA layers where there are any, into an existing directory."""
    lora = {name: tensor for name, tensor in tensors.items() if is_lora(name)}
    rest = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if name not in lora}
    save_file(rest, directory / WEIGHTS_NAME)
    numbers: dict[str, Any] = {
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "sha256": sha256(directory / WEIGHTS_NAME),
    }
    if lora:
        write_lora(directory / LORA_NAME, lora, header["lora"], header["base"]["name_or_path"])
        numbers["lora_sha256"] = sha256(directory / LORA_NAME / LORA_WEIGHTS_NAME)
    (directory / HEADER_NAME).write_text(json.dumps({**header, **numbers}, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A temporary sibling that takes the directory's place once everything in it is on disk.

    Raises:
        CheckpointError: writing failed; what was there before is untouched.
    """
    work = directory.with_name(f".{directory.name}.writing")
    try:
        remove_tree(work)
        old = directory.with_name(f".{directory.name}.old")
        if old.exists() and not directory.exists():  # a crash came between the two renames below
            os.replace(old, directory)
        work.mkdir(parents=True)
        yield work
        for path in [*(p for p in work.rglob("*") if p.is_file()), work]:
            sync_to_disk(path)
        remove_tree(old)
        if directory.exists():
            os.replace(directory, old)
        os.replace(work, directory)
        sync_to_disk(directory.parent)
        remove_tree(old)
    except (OSError, SafetensorError) as error:
        remove_tree(work)
        raise CheckpointError(
            f"{directory}: cannot be written ({error}). What was saved before is untouched; make room (or choose"
            " another paths.runs_dir) and run the same command again, which goes on from the last checkpoint."
        ) from error


def sync_to_disk(path: Path) -> None:
    """Has the system write a file or a directory out, so that a crash of the machine keeps it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(path: Path) -> None:
    """Removes a directory, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def on_hub(source: str | Path) -> tuple[str, str | None] | None:
    """The hub id and the revision (None: the main branch) that ``owner/name@revision`` means; None: it is a path."""
    name, _, revision = str(source).partition("@")
    if isinstance(source, Path) or is_folder(expanded(source)) or not is_hub_id(name) or is_folder(Path(name).parent):
        return None
    return name, revision or None


def read_header(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """The directory and the header of tuned weights, without reading any weights; a hub's are fetched.

    Args:
        source: the directory that training wrote, or a hub id, with ``@REVISION`` of a branch, tag or commit of it.

    Raises:
        CheckpointError: not such a directory, or a header of another format; a hub's that are not to be had.
    """
    if (hosted := on_hub(source)) is not None:
        directory = Checkpoint(*hosted, key="model.projector").fetch_weights()
    else:
        directory = expanded(source)
    path = directory / HEADER_NAME
    if not is_file(path) or not is_file(directory / WEIGHTS_NAME):
        what = "directory" if hosted is None else "repository"
        raise CheckpointError(
            f"model.projector={shown(source)}: no {HEADER_NAME} and {WEIGHTS_NAME} there. It must be a directory that"
            " `python train.py` wrote, such as runs/train/.../final, or a hub id (owner/name, owner/name@revision) of"
            f" a repository that `python -m vzip push` wrote; this {what} is not."
        )
    try:
        header = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable ({error}).") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not of the format {FORMAT}; it was written by another version or program.")
    wrong = [key for key, kind in _HEADER.items() if not isinstance(header.get(key), kind)]
    if not wrong:
        wrong = [f"base.{key}" for key, kind in _BASE.items() if not isinstance(header["base"].get(key), kind)]
    if wrong:
        raise CheckpointError(f"{path}: damaged, without a usable {', '.join(wrong)}; copy or train it again.")
    if "lora_sha256" in header and not (directory / LORA_NAME / LORA_WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"model.projector={source}: was trained with LoRA layers, but {LORA_NAME}/{LORA_WEIGHTS_NAME} is not there;"
            " copy the whole directory."
        )
    return directory, header


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory that ``write_tuned`` wrote, under the names it was given.

    Raises:
        CheckpointError: they cannot be read, or one holds something else than finite numbers.
    """
    lora = directory / LORA_NAME
    try:
        tensors = {**load_file(directory / WEIGHTS_NAME), **(read_lora(lora) if lora.is_dir() else {})}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{directory}: its weights cannot be read ({error}); copy or train it again.") from error
    check_finite(tensors, directory)
    return tensors


def check_finite(tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Refuses weights that hold NaN or infinity, with which every answer is the same.

    Raises:
        CheckpointError: naming them.
    """
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} of {len(tensors)} tensors hold NaN or infinity ({', '.join(wrong[:4])}"
            f"{', ...' if len(wrong) > 4 else ''}): the checkpoint is damaged, or its training diverged."
        )


def apply_tuned(
    adapter: Adapter, compressor: Compressor | None, source: str | Path, with_lora: bool = True
) -> dict[str, Any]:
    """Puts tuned weights into a loaded base model; returns their header.

    Args:
        adapter: of the base model.
        compressor: what it will be used with, to warn where that is not what it was tuned with; None: not known yet.
        source: as for ``read_header``.
        with_lora: also the LoRA layers trained with them; False: the caller sees to those.

    Raises:
        CheckpointError: damaged, tuned from another base model, or with LoRA layers for a model that has some already.
    """
    directory, header = read_header(source)
    if "lora_sha256" in header and with_lora and any(is_lora(name) for name, _ in adapter.model.named_parameters()):
        raise CheckpointError(
            f"model.projector={source}: brings the LoRA layers it was trained with, in {LORA_NAME}, but the model has"
            " some already: set model.adapter_path=null."
        )
    _check_base(adapter, header, directory)
    if compressor is not None and repr(compressor) not in tuned_with(header):
        logger.warning(
            "model.projector=%s was tuned with %s and is used with %s: the numbers are of neither.",
            source,
            " and ".join(tuned_with(header)),
            compressor,
        )
    own_lora = any(is_lora(name) for name, _ in adapter.model.named_parameters())
    if isinstance(under := header.get("loaded_lora"), dict) and not own_lora:
        logger.warning(
            "model.projector=%s was tuned on top of LoRA layers (%s), and this model has none: the numbers are of"
            " neither. Load it with model.adapter_path, unless its weights have them merged.",
            source,
            under.get("name_or_path"),
        )
    load_tensors(adapter.model, checked_tensors(directory, header), directory)
    if "lora_sha256" in header and with_lora:
        apply_peft_checkpoint(adapter.model, directory / LORA_NAME)
    return header


def checked_tensors(directory: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tuned tensors, LoRA layers left out, once every file is as it was written.

    Raises:
        CheckpointError: one is not, or holds something else than finite numbers.
    """
    _check_digest(directory / WEIGHTS_NAME, header["sha256"])
    if "lora_sha256" in header:
        _check_digest(directory / LORA_NAME / LORA_WEIGHTS_NAME, header["lora_sha256"])
    if (directory / DIGESTS_NAME).is_file():
        check_digests(directory, "Copy or train it again.")
    return {name: tensor for name, tensor in read_tensors(directory).items() if not is_lora(name)}


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Copies tensors into the parameters of the same names, in the model's own precision.

    Raises:
        CheckpointError: a name or size that the model does not have.
    """
    own = dict(model.named_parameters())
    wrong = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{directory}: tuned from another base model; {len(wrong)} of its {len(tensors)} tensors do not fit"
            f" {model.name_or_path} ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _check_digest(path: Path, expected: str) -> None:
    if sha256(path) != expected:
        raise CheckpointError(f"{path}: damaged (its SHA-256 is not the header's); copy or train it again.")


def _check_base(adapter: Adapter, header: Mapping[str, Any], directory: Path) -> None:
    base, model = header["base"], adapter.model
    if base["model_class"] != type(model).__name__ or not same_numbers(base_probe(adapter), base["probe"]):
        raise CheckpointError(
            f"{directory}: tuned from {base['name_or_path']} (revision {base['revision']}, {base['model_class']}), but"
            f" the model is {model.name_or_path} ({type(model).__name__}): its other weights are not the same. Load the"
            " base it was tuned from, or leave model.projector out."
        )
