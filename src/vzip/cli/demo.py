"""The whole story on the built-in model, offline: every method and budget in one table, a plot and an image.

  python -m vzip demo                   some minutes on two cores (make demo)
  python -m vzip demo --limit 20        twenty of its 400 images: the table is provisional
  python -m vzip demo --out DIR         elsewhere than runs/demo

Evaluates vanilla (all 576 visual tokens), VisionZip and two controls at 192, 128, 64 and 32 tokens on the 1600
questions of the scenes benchmark, measures what each costs, and writes to `--out`: table.md, results.json,
retention.png and overlay.png (kept patches and merge groups). Files of an earlier demo there are replaced.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vzip.errors import ConfigError
from vzip.results.owner import owning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for table, plot and overlay")
    parser.add_argument("--limit", type=int, default=None, help="only the first N of the 400 images (provisional)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time")


def main(arguments: argparse.Namespace) -> int:
    """Evaluates, measures, prints and writes."""
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be 1 or more")
    with owning(arguments.out, "--out DIR"):
        from vzip.demo.show import show  # only now: torch and transformers take their seconds

        show(arguments.out, arguments.limit, arguments.batch_size)
    return 0
