"""Copies the golden files the tests need from a folder of reference outputs.

    python scripts/make_golden.py ORACLE_DIR [--check]

ORACLE_DIR holds what the published VisionZip code (and MGM's, for Mini-Gemini) computes on small random models:
`compress_*.safetensors`, `llava15_tiny/`, `llava_next_tiny/`, `qwen2_5_vl_tiny/`, `image_preprocessing.safetensors` and
`mini_gemini_mining.safetensors`, in the layout described in tests/golden/README.md. The files are numbers made by other
people's code, so they are copied, never recomputed from ours. `--check` compares instead and writes nothing.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
from pathlib import Path

PATTERNS = (
    "compress_*.safetensors",
    "llava15_tiny/*",
    "llava_next_tiny/*",
    "image_preprocessing.safetensors",
    "mini_gemini_mining.safetensors",
    "rivals/inputs/p*",
    "qwen2_5_vl_tiny/*_w2.*",
    "qwen2_5_vl_tiny/inputs.safetensors",
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
TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden"


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
            same = target.is_file() and filecmp.cmp(source, target, shallow=False)
            if not same and arguments.check:
                print(f"differs: {target}", file=sys.stderr)
                failures += 1
            elif not same:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                print(f"copied: {target.relative_to(TARGET)}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
