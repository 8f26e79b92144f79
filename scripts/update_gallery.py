"""Puts the figures that `make gallery` has drawn into docs/gallery, and writes docs/gallery.md, which shows them.

.venv/bin/python scripts/update_gallery.py
"""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DRAWN = ROOT / "runs" / "figures"
FOLDER, PAGE = ROOT / "docs" / "gallery", ROOT / "docs" / "gallery.md"
SHOWN = ("csv", "txt")  # of what a figure is written as, beside the picture: numbers, caption
HEAD = """# Gallery

The built-in model's, by `make gallery` and `make demo`. It is a small model on generated images: what is shown is that
the path works, and how it looks. The same commands draw a real model's: [reproduce a table](reproduce.md#figures).

## What is kept

![What was kept and merged of a scene at 64 of 576 tokens, with question and answer](example.png)

By `python -m vzip ask docs/scene.png "What word is written on the sign?" budget=64tok --overlay docs/example.png`.

## Retention against visual tokens

![Retention against visual tokens, VisionZip and two controls](retention.png)

By `make demo`; the table and how far to trust it: [the first hour](first-hour.md).

## Retention against time

![Retention against time to the first token, methods at two budgets](pareto.svg)

By `make gallery`; the table: [leaderboard](leaderboard.md).
"""


def page(folder: Path) -> str:
    """The page that shows the figures of a folder, each with its caption and the numbers behind it."""
    captions = sorted(folder.glob("figure_*.txt"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])
    parts = [HEAD]
    for path in captions:
        number = path.stem.removeprefix("figure_")
        first, *findings = html.escape(path.read_text(encoding="utf-8").strip(), quote=False).splitlines()
        listed = "".join(f"- {finding}\n" for finding in findings)
        parts.append(
            f"## The paper's Figure {number}\n\n![Figure {number}]({folder.name}/{path.stem}.webp)\n\n{first}"
            f" By `make gallery`; [numbers]({folder.name}/{path.stem}.csv).\n" + (f"\n{listed}" if listed else "")
        )
    return "\n".join(parts)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for ending in SHOWN:
        for path in sorted(DRAWN.glob(f"figure_*.{ending}")):
            shutil.copyfile(path, FOLDER / path.name)
    for path in sorted(DRAWN.glob("figure_*.png")):
        # A tenth of the PNG, which every regeneration would add to the repository.
        Image.open(path).convert("RGB").save(FOLDER / f"{path.stem}.webp", quality=85, method=6)
    PAGE.write_text(page(FOLDER), encoding="utf-8")


if __name__ == "__main__":
    main()
