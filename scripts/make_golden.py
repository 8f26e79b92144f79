"""Copies the golden files the tests need from a folder of reference outputs.

    python scripts/make_golden.py ORACLE_DIR [--check]

ORACLE_DIR holds what the published VisionZip code (and MGM's, for Mini-Gemini) computes on small random models:
`compress_*.safetensors`, `llava15_tiny/`, `llava_next_tiny/`, `qwen2_5_vl_tiny/`, `image_preprocessing.safetensors` and
`mini_gemini_mining.safetensors`, `llava_layout_tiny/`, `languagebind_tiny/`, in the layout described in
tests/golden/README.md. The files are numbers made by other people's code, so they are copied, never recomputed from
ours; of a few large ones a part is kept. `--check` compares instead and writes nothing.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

PATTERNS = (
    "compress_*.safetensors",
    "llava15_tiny/*",
    "llava_next_tiny/*",
    "image_preprocessing.safetensors",
    "mini_gemini_mining.safetensors",
    "rivals/inputs/p*",
    "qwen2_5_vl_tiny/*_w2.*",
    "qwen2_5_vl_tiny/inputs.safetensors",
    "llava_layout_tiny/llava-v1.5-tiny*/*",  # the language model of all three is the first one's
    "llava_layout_tiny/openai/clip-tiny/*",
    "llava_layout_tiny/vicuna-tiny/config.json",
    "languagebind_tiny/*s.safetensors",
    "languagebind_tiny/config.json",
)
# Of the other methods' outputs only those of methods that are built, and of the larger files few.
RIVALS = (
    *("divprune_p*", "fastervlm_p*", "vscan_stage1_p*"),
    *("vispruner_p*_k[16][24].*", "vispruner_r075_p*", "scope_p*_k[16][24].*", "holov_p*_k[16][24].*"),
    *("holov_full_chunk_p*", "prunesid_exact_svd_p*_k1*", "prunesid_exact_svd_p*_k64.*"),
    *(
        "prumerge_p49_*",
        "prumerge_fixed_p49_*",
        "prumerge_fixed_p*_k32.*",
        "prumerge_plus_p*",
        "prumerge_plus_fixed_p*",
    ),
    *("zooprune_p49_*", "zooprune_p*_k32.*"),
    *("cdpruner_*", "mmtok_p*"),
)
# Of each prompt's logits the last rows; of LanguageBind two clips and an image, up to the layer that is read.
NUM_LOGITS = 8
OF_LANGUAGEBIND = ("hidden_states.2", "cls_attention.1", "keys.1", "pixel_values")
TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden"


def part_of(source: Path) -> bytes | None:
    """What is kept of a file; None: all of it."""
    if source.suffix != ".safetensors" or (source.parent.name != "languagebind_tiny" and source.stem != "expected"):
        return None
    with safe_open(source, framework="pt") as opened:
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    if source.stem == "expected":
        kept = {n: t for n, t in tensors.items() if not n.startswith("batch.") and not n.endswith("inputs_embeds")}
        kept = {n.removesuffix("_last16"): t[:, -NUM_LOGITS:] if ".logits" in n else t for n, t in kept.items()}
    elif source.stem == "weights":
        kept = {name: tensor.half() for name, tensor in tensors.items()}
        assert all(torch.equal(kept[name].float(), tensor) for name, tensor in tensors.items())
    else:
        kept = {n: t for n, t in tensors.items() if n.startswith(("video16", "image")) and n.endswith(OF_LANGUAGEBIND)}
    prompts = {key: value for key, value in (metadata or {}).items() if key == "prompts"}
    return save({name: tensor.contiguous() for name, tensor in kept.items()}, prompts or None)


def main() -> int:
    """Copies or compares; returns 1 if something is missing or, with --check, differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("oracle_dir", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with tests/golden instead of copying")
    arguments = parser.parse_args()
    failures = 0
    for pattern in (*PATTERNS, *(f"rivals/cases/{name}" for name in RIVALS)):
        sources = sorted(arguments.oracle_dir.glob(pattern))
        if not sources:
            print(f"missing: nothing in {arguments.oracle_dir} matches {pattern}", file=sys.stderr)
            failures += 1
        for source in sources:
            target = TARGET / source.relative_to(arguments.oracle_dir)
            data = part_of(source)
            if data is None:
                same = target.is_file() and filecmp.cmp(source, target, shallow=False)
            else:
                same = target.is_file() and target.read_bytes() == data
            if not same and arguments.check:
                print(f"differs: {target}", file=sys.stderr)
                failures += 1
            elif not same:
                target.parent.mkdir(parents=True, exist_ok=True)
                if data is None:
                    shutil.copyfile(source, target)
                else:
                    target.write_bytes(data)
                print(f"copied: {target.relative_to(TARGET)}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
