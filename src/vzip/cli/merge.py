"""Writes a plain Hugging Face checkpoint with the tuned weights in it, which stock from_pretrained loads.

  python -m vzip merge runs/train/.../final --out DIR
  python -m vzip merge runs/train/.../best --out DIR            as it was where the validation loss was lowest
  python -m vzip merge FINAL --out DIR --base CHECKPOINT        with the base model elsewhere
  python -m vzip merge FINAL --out DIR --mm-projector           the projector alone, as LLaVA's own code reads it

The base model is read as the tuned weights' header names it, or from --base DIR; the result is in the base's precision.
LoRA layers that were trained with them are added into the weights that they belong to.

--mm-projector writes mm_projector.bin and, of a base in LLaVA's own layout, config.json, which LLaVA's code wants
beside it (load_pretrained_model(DIR, model_base=BASE, ...)). It names the base, so that
model.name_or_path=DIR is the tuned model.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import CheckpointError
from vzip.results.files import check_writable

if TYPE_CHECKING:
    from vzip.models.vlm import CompressedVlm

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tuned", type=Path, help="the directory that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes; must not hold anything yet")
    parser.add_argument("--base", default=None, help="directory or hub id of the base model (default: the header's)")
    parser.add_argument("--mm-projector", action="store_true", help="write mm_projector.bin instead, for LLaVA's code")


def main(args: argparse.Namespace) -> int:
    if args.mm_projector:
        write_mm_projector(args.tuned, args.out, args.base)
        return 0
    merge(args.tuned, args.out, args.base)
    logger.info("wrote %s; load it with model=llava_local model.name_or_path=%s", args.out, args.out)
    return 0


def merge(tuned: Path, out: Path, base: str | None = None) -> None:
    """Loads the base model, puts the tuned weights in and saves model and processor to ``out``.

    Raises:
        CheckpointError: ``out`` holds something, cannot be written, or the weights belong to another base model.
    """
    from vzip.models.weights.tuned import LORA_NAME, atomic_directory, read_header

    _check_new(out)
    directory, header = read_header(tuned)
    vlm = _tuned_model(tuned, header, base)
    model: Any = vlm.model
    if "lora_sha256" in header:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(directory / LORA_NAME)).merge_and_unload()
    with atomic_directory(out) as work:
        model.save_pretrained(work)
        if vlm.processor is not None:
            vlm.processor.save_pretrained(work)


def write_mm_projector(tuned: Path, out: Path, base: str | None = None) -> None:
    """Loads the base model and saves its tuned projector to ``out`` in LLaVA's own layout, in the base's precision.

    Raises:
        CheckpointError: as ``merge``; more was tuned than the projector; the base holds LoRA layers in LLaVA's layout.
        UnsupportedModelError: a base that LLaVA's code has no class for.
    """
    from vzip.models.families.original.llava import PROJECTOR_NAME, projector_alone
    from vzip.models.weights.tuned import atomic_directory, read_header

    _check_new(out)
    _, header = read_header(tuned)
    if (parts := [*header.get("parts", []), *(["lora"] if "lora_sha256" in header else [])]) != ["projector"]:
        raise CheckpointError(
            f"{tuned}: {', '.join(parts)} were tuned, and {PROJECTOR_NAME} holds a projector alone. Leave"
            " --mm-projector out, which writes the whole model."
        )
    vlm = _tuned_model(tuned, header, base)
    tensors, config = projector_alone(vlm.model, vlm.adapter.projector, Path(vlm.name_or_path))
    with atomic_directory(out) as work:
        import torch

        torch.save(tensors, work / PROJECTOR_NAME)
        if config is not None:
            (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    logger.info(
        "wrote %s%s",
        out,
        f"; load it with model=llava_local model.name_or_path={out}"
        if config is not None
        else ". LLaVA's code wants a config.json beside it: that of the same model in LLaVA's own layout",
    )


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out={out}: exists already; name a new directory.")
    check_writable(out.parent)


def _tuned_model(tuned: Path, header: Mapping[str, Any], base: str | None) -> CompressedVlm:
    """The base model with the tuned weights in it, LoRA layers left out."""
    from vzip.models.load import load_vlm
    from vzip.models.weights.tuned import apply_tuned

    if base is None and isinstance(under := header.get("loaded_lora"), dict):
        raise CheckpointError(
            f"{tuned}: tuned on top of LoRA layers ({under.get('name_or_path')}), which would be missing. Merge these"
            " into the base model first (PEFT's merge_and_unload) and give that: --base DIR."
        )
    named = header["base"]
    vlm = load_vlm(base or named["name_or_path"], revision=None if base else named["revision"])
    apply_tuned(vlm.adapter, None, tuned, with_lora=False)
    return vlm
