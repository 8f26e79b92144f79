"""Writes a plain Hugging Face checkpoint with the tuned weights in it, which stock from_pretrained loads.

  python -m vzip merge runs/train/.../final --out DIR
  python -m vzip merge runs/train/.../best --out DIR            as it was where the validation loss was lowest
  python -m vzip merge FINAL --out DIR --base CHECKPOINT        with the base model elsewhere

The base model is read as the tuned weights' header names it, or from --base DIR; the result is in the base's precision.
LoRA layers that were trained with them are added into the weights that they belong to.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from vzip.errors import CheckpointError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tuned", type=Path, help="the directory that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes; must not hold anything yet")
    parser.add_argument("--base", default=None, help="directory or hub id of the base model (default: the header's)")


def main(args: argparse.Namespace) -> int:
    merge(args.tuned, args.out, args.base)
    logger.info("wrote %s; load it with model=llava_local model.name_or_path=%s", args.out, args.out)
    return 0


def merge(tuned: Path, out: Path, base: str | None = None) -> None:
    """Loads the base model, puts the tuned weights in and saves model and processor to ``out``.

    Raises:
        CheckpointError: ``out`` holds something, cannot be written, or the weights belong to another base model.
    """
    from vzip.models.load import load_vlm
    from vzip.models.weights.tuned import LORA_NAME, apply_tuned, atomic_directory, read_header

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out={out}: exists already; name a new directory.")
    directory, header = read_header(tuned)
    named = header["base"]
    vlm = load_vlm(base or named["name_or_path"], revision=None if base else named["revision"])
    apply_tuned(vlm.adapter, None, tuned, with_lora=False)
    model: Any = vlm.model
    if "lora_sha256" in header:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(directory / LORA_NAME)).merge_and_unload()
    with atomic_directory(out) as work:
        model.save_pretrained(work)
        if vlm.processor is not None:
            vlm.processor.save_pretrained(work)
