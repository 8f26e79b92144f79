"""PEFT checkpoints (LoRA and its kin) on top of a loaded model.

Not to be confused with ``adapters``, which here are families of models. The layers stay beside the model's own weights
and are not merged into them, so that they also go with quantized and offloaded ones.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from vzip.errors import CheckpointError, UnsupportedModelError
from vzip.installed import missing_package

from ..hub import HUB_ID, READ_ERRORS, Checkpoint

_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# LLaVA's own training code keeps its projector here, under names of its own.
_OTHER_WEIGHTS = "non_lora_trainables.bin"
# 5.17 looks for whole modules (modules_to_save) under names the checkpoint does not have; seen right in 5.18 and 5.23.
_PLACES_WHOLE_MODULES = Version("5.18.0")


def check_peft_checkpoint(adapter_path: str | Path) -> None:
    """Checks what can be known before the model's weights are read.

    Args:
        adapter_path: a directory, or a hub id.

    Raises:
        CheckpointError: no such checkpoint, files missing, or files that would be left out.
        UnsupportedModelError: a method that adds prompt tokens instead of changing layers; whole modules in it, which
            transformers 5.17 cannot place.
        MissingPackageError: peft is not installed.
    """
    try:
        from peft import PeftConfig  # only here: whoever loads no PEFT checkpoint does without the package
    except ImportError as error:
        what = f"model.adapter_path={adapter_path}"
        raise missing_package(what, "peft", error, otherwise="set model.adapter_path=null") from error
    path = Path(adapter_path).expanduser()
    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            raise CheckpointError(f"model.adapter_path={path}: no adapter_config.json; it must be a PEFT checkpoint.")
        if not any((path / name).is_file() for name in _WEIGHT_FILES):
            raise CheckpointError(f"model.adapter_path={path}: holds no weights ({', '.join(_WEIGHT_FILES)}).")
        if (path / _OTHER_WEIGHTS).exists():
            raise CheckpointError(
                f"model.adapter_path={path}: holds {_OTHER_WEIGHTS}, weights in the names of LLaVA's own code, which"
                " would be left out. Convert the checkpoint: save those modules with PEFT's modules_to_save."
            )
    folder = _folder(adapter_path)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except READ_ERRORS as error:
        raise CheckpointError(
            f"model.adapter_path={adapter_path}: not a readable PEFT checkpoint ({_first_line(error)})."
        ) from error
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"model.adapter_path={adapter_path}: {config.peft_type.value} adds tokens to the prompt, whose positions"
            " compression changes; LoRA and other methods that change layers are supported."
        )
    if config.modules_to_save and Version(transformers.__version__) < _PLACES_WHOLE_MODULES:
        modules = ", ".join(config.modules_to_save)
        raise UnsupportedModelError(
            f"model.adapter_path={adapter_path}: beside its layers it holds whole modules (modules_to_save: {modules}),"
            f" which transformers {transformers.__version__} does not put in their places; transformers"
            f" {_PLACES_WHOLE_MODULES} does. Upgrade it: pip install -c lock.txt transformers."
        )


def peft_weights_sha256(adapter_path: str | Path) -> str:
    """Digest of a PEFT checkpoint's weights, by which a record tells two under one name apart; a hub's are fetched.

    Raises:
        CheckpointError: there are none, or they cannot be fetched.
    """
    folder = _folder(adapter_path)
    files = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"model.adapter_path={adapter_path}: holds no weights ({', '.join(_WEIGHT_FILES)}).")
    with files[0].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apply_peft_checkpoint(model: PreTrainedModel, adapter_path: str | Path) -> None:
    """Puts a PEFT checkpoint's layers into the model, in place, frozen.

    Names of transformers 4's module tree are translated. Every tensor of the checkpoint must find its place and every
    new layer its weights: Hugging Face only warns of either.

    Raises:
        CheckpointError: tensors that are missing, unexpected or of another size, or layers the model does not have.
    """
    try:
        report = model.load_adapter(str(_folder(adapter_path)))
    except READ_ERRORS as error:
        raise CheckpointError(
            f"model.adapter_path={adapter_path}: does not fit {type(model).__name__} ({_first_line(error)}). It must"
            " have been made for this base model, in the same size."
        ) from error
    missing, unexpected = sorted(report.missing_keys), sorted(report.unexpected_keys)
    if missing or unexpected:
        names = [*missing, *unexpected]
        raise CheckpointError(
            f"model.adapter_path={adapter_path}: {len(missing)} tensors are missing and {len(unexpected)} have no place"
            f" in {type(model).__name__} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}). It must have been"
            " made for this base model."
        )


def _folder(adapter_path: str | Path) -> Path:
    """The directory of a PEFT checkpoint; a hub's is fetched, weights included. Raises CheckpointError."""
    path = Path(adapter_path).expanduser()
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(str(adapter_path)):
        raise CheckpointError(f"model.adapter_path={adapter_path}: neither a directory nor a hub id (owner/name).")
    return Checkpoint(str(adapter_path), key="model.adapter_path").fetch_weights()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
