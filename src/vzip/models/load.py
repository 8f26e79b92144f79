"""Loading a checkpoint, a directory or a hub id, with every check that needs no weights made before any is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, ProcessorMixin

from vzip.compressors.base import Compressor, check_is_compressor
from vzip.compressors.controls import Identity
from vzip.errors import CheckpointError, ConfigError, VzipError, nearest
from vzip.json_files import read_json
from vzip.media.images import PREPROCESSES, Preprocess
from vzip.media.video import check_num_frames
from vzip.paths import expanded, is_file, is_folder, shown
from vzip.pruners.base import Pruner

from .compiled import check_compiler, check_compiles, check_parts
from .devices import first_device
from .environment import refuse_broken_packages
from .families import Adapter, FamilyOptions, adapter_class_for_config, original_checkpoint
from .families.finite import damaged_weights
from .families.options import Positions
from .hub import BUILT_IN_NAME, READ_ERRORS, Checkpoint, built_in_folder, is_hub_id, shards_of
from .vlm import CompressedVlm
from .weights.lora import apply_peft_checkpoint, check_peft_checkpoint, peft_weights_sha256
from .weights.quantization import QUANTIZATIONS, compute_dtype, modules_outside, quantization_config
from .weights.tuned import LORA_NAME, apply_tuned, read_header

_LOG = logging.getLogger(__name__)

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Computed from the configuration; older checkpoints hold them all the same.
_BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids|num_batches_tracked|masked_bias|causal_mask|attn\.bias)$")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def load_vlm(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: Any = None,
    attn_implementation: str = "sdpa",
    quantization: str | None = None,
    compressor: Compressor | None = None,
    preprocess: Preprocess | None = None,
    drop_padding: bool = False,
    row_newline: bool = False,
    num_frames: int | None = None,
    drop_cls: bool = False,
    adapter_path: str | Path | None = None,
    projector: str | Path | None = None,
    pruner: Pruner | None = None,
    positions: Positions | None = None,
    fps: float | None = None,
    min_frame_pixels: int | None = None,
    max_frame_pixels: int | None = None,
    compile: Sequence[str] | str | None = None,
) -> CompressedVlm:
    """Loads a checkpoint and wraps it.

    Args:
        name_or_path: a directory, a hub id (``llava-hf/llava-1.5-7b-hf``), or ``vzip/tiny``, the model in the package.
        revision: branch, tag or commit on the hub.
        dtype: ``auto`` (as the checkpoint says), ``float32``, ``bfloat16`` or ``float16``.
        device_map: as Hugging Face's; None loads to the CPU.
        attn_implementation: as Hugging Face's; compression needs no particular one.
        quantization: None, ``8bit`` or ``4bit``: the language model only, through bitsandbytes; the rest is in
            ``dtype``. With ``device_map=None`` it goes to the first GPU where there is one.
        compressor: the method; None is ``Identity()``.
        preprocess: ``llava`` or ``hf``; None: as the model was trained (the first of these that the family has, but
            ``hf`` of a LLaVA with ``image_aspect_ratio: square``).
        drop_padding, row_newline: as for ``CompressedVlm``: options of LLaVA-NeXT.
        num_frames: as for ``CompressedVlm``: frames taken of a video.
        drop_cls: as for ``CompressedVlm``: an option of Mini-Gemini.
        positions: as for ``CompressedVlm``: position ids of visual tokens, ``original`` or ``repacked``; None: the
            family's own.
        fps, min_frame_pixels, max_frame_pixels: as for ``CompressedVlm``: how Qwen2.5-VL and Qwen3-VL take videos.
        projector: tuned weights (``vzip.models.weights.tuned``): the directory that training wrote, or a hub id, with
            ``@REVISION`` of a certain revision; another budget than theirs is warned of, another base model an error.
        adapter_path: a PEFT checkpoint (LoRA), directory or hub id, put on the model (``vzip.models.weights.lora``).
        pruner: drops visual tokens inside the language model, as ``vzip.FastV()``; None: nothing is dropped there.
        compile: as for ``CompressedVlm``: ``tower``, ``prefill``, ``decode`` under ``torch.compile``; None: nothing.

    Returns:
        the wrapped model in eval mode, with its processor if the checkpoint has one.

    Raises:
        ConfigError: a setting that cannot work, a budget that does not fit the vision tower.
        CheckpointError: a checkpoint that cannot be found, reached or read.
        UnsupportedModelError: a model class, vision tower or setting without an adapter.
        MissingPackageError: bitsandbytes is missing, or an installed package is broken; ``compile`` without a compiler.
    """
    _check_choice("model.dtype", dtype, DTYPES)
    if preprocess is not None:
        _check_choice("model.preprocess", preprocess, PREPROCESSES)
    if num_frames is not None:
        check_num_frames(num_frames)
    if quantization is not None:
        _check_choice("model.quantization", quantization, QUANTIZATIONS, "null")
    parts = check_parts(compile)
    check_compiler(parts, first_device(device_map))
    refuse_broken_packages(["torchvision", "timm"])
    source = resolve_checkpoint(name_or_path)
    compressor = Identity() if compressor is None else compressor
    check_is_compressor(compressor)

    checkpoint = Checkpoint(source, revision, key="model.name_or_path")
    directory = checkpoint.directory
    config = read_config(directory)
    adapter_class = reach(source, lambda: adapter_class_for_config(config))
    of_videos = (fps, min_frame_pixels, max_frame_pixels)
    options = FamilyOptions(drop_padding, row_newline, drop_cls, positions, *of_videos)
    adapter_class.check_positions(options, attn_implementation)
    reach(source, lambda: adapter_class.check_settings(config, compressor, options, num_frames))
    adapter_class.check_preprocess(preprocess)
    if pruner is not None:
        adapter_class.check_pruner(config, pruner)
    check_compiles(
        parts,
        adapter_class,
        config,
        compressor,
        pruner=pruner,
        attn_implementation=attn_implementation,
        quantization=quantization,
    )
    if adapter_path is not None:
        check_peft_checkpoint(adapter_path)
    if projector is not None:
        projector = read_header(projector)[0]  # of a hub's: fetched, and of one commit from here on
    if checkpoint.fetch_weights() and original_checkpoint(directory) is None:
        _check_weight_files(directory)

    settings: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "device_map": device_map,
        "attn_implementation": attn_implementation,
    }
    if quantization is not None:
        settings |= _quantization_settings(adapter_class, config, quantization, dtype)
    processor = _load_processor(adapter_class, directory)
    # Sizes that differ are let through here only to be refused below together with what is missing.
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = reach(source, lambda: adapter_class.load_model(directory, config, **settings))
    check_complete(source, report)
    _refuse_damaged(source, model)
    if adapter_path is not None:
        apply_peft_checkpoint(model, adapter_path)
        _refuse_damaged(f"model.adapter_path={adapter_path}", model)
    model.eval()
    vlm = CompressedVlm(
        model,
        compressor,
        processor,
        preprocess,
        drop_padding,
        row_newline,
        num_frames,
        drop_cls,
        pruner,
        positions,
        *of_videos,
        compile=parts,
    )
    vlm.name_or_path, vlm.revision = str(source), checkpoint.commit
    lora = adapter_path
    if projector is not None:
        header = apply_tuned(vlm.adapter, compressor, projector)
        lora = Path(projector) / LORA_NAME if "lora_sha256" in header else lora
    if lora is not None:
        vlm.lora = {"name_or_path": str(lora), "sha256": peft_weights_sha256(lora)}
    return vlm


def check_takes_videos(name_or_path: str | Path, revision: str | None = None) -> None:
    """Raises UnsupportedModelError, or as ``load_vlm``, for a model without videos; no weight is read."""
    source = resolve_checkpoint(name_or_path)
    config = read_config(Checkpoint(source, revision, key="model.name_or_path").directory)
    reach(source, lambda: adapter_class_for_config(config)).check_takes_videos()


def read_config(directory: Path) -> Any:
    """The configuration of a checkpoint, in Hugging Face's layout or in its authors'.

    Raises:
        CheckpointError: it cannot be read, or wants code of its own to be run, which is never done.
    """
    return reach(directory, lambda: _read_config(directory))


def _read_config(directory: Path) -> Any:
    path = directory / "config.json"
    if not isinstance(read_json(path), dict):
        raise ValueError(f"{path.name} must hold an object")
    original = original_checkpoint(directory)
    return AutoConfig.from_pretrained(directory, trust_remote_code=False) if original is None else original.config()


def resolve_checkpoint(name_or_path: str | Path) -> Path | str:
    """A directory as ``Path``, a hub id as ``str``; ``vzip/tiny`` becomes the package's directory.

    Raises:
        CheckpointError: neither a directory with a ``config.json`` nor anything that could be a hub id.
    """
    if str(name_or_path) == BUILT_IN_NAME:
        tiny = built_in_folder()
        if not (tiny / "config.json").is_file():
            raise CheckpointError(f"{BUILT_IN_NAME}: {tiny} holds no checkpoint; train it with `make tiny`.")
        return tiny
    path = expanded(name_or_path)
    if is_folder(path):
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"model.name_or_path={name_or_path}: the directory holds no config.json. It must be a checkpoint in"
                " Hugging Face format (config.json, weights, processor and tokenizer files)."
            )
        return path
    if is_file(path):
        raise CheckpointError(f"model.name_or_path={name_or_path}: is a file; a checkpoint is a directory.")
    if isinstance(name_or_path, Path) or not is_hub_id(name_or_path) or is_folder(path.parent):
        raise CheckpointError(
            f"model.name_or_path={shown(name_or_path)}: no such directory. Give a checkpoint directory, a hub id such"
            f" as llava-hf/llava-1.5-7b-hf, or {BUILT_IN_NAME}."
        )
    return str(name_or_path)


def _quantization_settings(adapter_class: type[Adapter], config: Any, quantization: str, dtype: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize the language model and nothing else."""
    compute = compute_dtype(DTYPES[dtype], config)
    with torch.device("meta"):
        skeleton = adapter_class.model_class(config)
    unquantized = modules_outside(skeleton, adapter_class(skeleton).language_model)
    return {"dtype": compute, "quantization_config": quantization_config(quantization, compute, unquantized)}


def _check_choice(key: str, value: object, allowed: Any, *more: str) -> None:
    names = [*allowed, *more]
    if value not in list(allowed):
        raise ConfigError(f"{key}={value}: must be one of {', '.join(names)}{nearest(str(value), names)}.")


def reach(source: Path | str, load: Any) -> Any:
    """Runs a Hugging Face loader on files of this machine and turns what it raises for unreadable ones into ours."""
    try:
        return load()
    except (VzipError, torch.OutOfMemoryError):
        raise
    except READ_ERRORS as error:
        lines = str(error).strip().splitlines()
        first_line = " ".join([type(error).__name__, *lines[:1]]) if len("".join(lines)) < 20 else lines[0]
        own_code = "" if "trust_remote_code" not in str(error) else " It brings code of its own, which vzip never runs."
        raise CheckpointError(f"{source}: the checkpoint cannot be loaded ({first_line}).{own_code}") from error


def _check_weight_files(directory: Path) -> None:
    """Raises CheckpointError unless the directory holds all weight files it names."""
    for index_name in _WEIGHT_INDEXES:
        index = directory / index_name
        if index.is_file():
            wanted = shards_of(index)
            missing = sorted(name for name in wanted if not (directory / name).is_file())
            if missing:
                raise CheckpointError(
                    f"{directory}: {len(missing)} of {len(wanted)} weight files are missing ({', '.join(missing[:4])}"
                    f"{', ...' if len(missing) > 4 else ''}); {index_name} names them. Download them again."
                )
            return
    if not any((directory / name).is_file() for name in _WEIGHT_FILES):
        raise CheckpointError(
            f"{directory}: has a config.json but no weights ({', '.join((*_WEIGHT_FILES, *_WEIGHT_INDEXES))})."
        )


def _refuse_damaged(source: Path | str, model: Any) -> None:
    """Raises CheckpointError if weights hold NaN or infinity."""
    if damaged := damaged_weights(model):
        raise CheckpointError(
            f"{source}: {len(damaged)} tensors hold NaN or infinity ({', '.join(damaged[:4])}"
            f"{', ...' if len(damaged) > 4 else ''}): the checkpoint is damaged, or its training diverged."
        )


def check_complete(source: Path | str, report: dict[str, Any], not_wanted: str = "") -> None:
    """Refuses what Hugging Face only warns of.

    Args:
        source: for messages.
        report: what ``from_pretrained`` says it has loaded.
        not_wanted: regular expression of the beginnings of names that the checkpoint may have and the model not.

    Raises:
        CheckpointError: parameters that were left random, or weights of the checkpoint that have no place.
    """
    left_over = sorted(name for name in report["unexpected_keys"] if not _BUFFERS.search(name))
    if not_wanted:
        left_over = [name for name in left_over if not re.match(not_wanted, name)]
    if left_over:
        raise CheckpointError(
            f"{source}: {len(left_over)} weights have no place in the model that its config.json describes"
            f" ({', '.join(left_over[:4])}{', ...' if len(left_over) > 4 else ''}); without them it would compute"
            " something else. The config.json belongs to another checkpoint, or denies a part (attention_bias,"
            " num_hidden_layers ...)."
        )
    absent = sorted(report["missing_keys"])
    other_size = sorted(str(key[0]) for key in report["mismatched_keys"])
    if absent or other_size:
        names = [*absent, *other_size]
        raise CheckpointError(
            f"{source}: {len(absent)} parameters are not in the checkpoint and {len(other_size)} have another size"
            f" than its config.json says ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}); they would stay"
            " random. The checkpoint is damaged, or belongs to another architecture."
        )


def _load_processor(adapter_class: type[Adapter], directory: Path) -> ProcessorMixin | None:
    """The checkpoint's processor; None for a directory that holds none of its files."""
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
    original = adapter_class.original(directory)
    folder = directory if original is None else original.tokenizer_folder()
    if not any((folder / name).is_file() for name in (*files, "tokenizer.model")):
        _LOG.warning("%s holds no processor; the model takes tensors only.", directory)
        return None
    return reach(directory, lambda: adapter_class.load_processor(directory))
