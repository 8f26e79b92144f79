"""Puts the curves that `make curves` has measured into docs/performance, and their tables into docs/performance.md.

.venv/bin/python scripts/update_performance.py
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vzip.json_files import read_json
from vzip.report.curves import WORDS, machine, tables

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "runs" / "curves"
FOLDER, PAGE = ROOT / "docs" / "performance", ROOT / "docs" / "performance.md"
RECORD = "curves.json"
SHOWN = ("png", "svg", "csv")
_PART = re.compile(r"(<!-- curves: .*? -->\n)(.*?)(<!-- end of curves -->)", re.DOTALL)


def part(record: Mapping[str, Any], folder: str) -> str:
    """What stands between the page's marks: what was measured, a figure an axis, the tables."""
    figures = "\n\n".join(
        f"![Cost against {words}]({folder}/curves_{axis}.png)\n\n[SVG]({folder}/curves_{axis}.svg),"
        f" [numbers]({folder}/curves_{axis}.csv)"
        for axis, words in WORDS.items()
    )
    measured = html.escape(machine(record), quote=False)
    return f"{measured}. All values: [record]({folder}/{RECORD}).\n\n{figures}\n\n{tables(record)}"


def put(page: str, content: str) -> str:
    """The page with this between its marks."""
    page, count = _PART.subn(lambda found: f"{found[1]}{content.strip()}\n\n{found[3]}", page)
    if count != 1:
        raise SystemExit(f"{count} places for the curves; exactly one is expected")
    return page


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    shutil.copyfile(MEASURED / RECORD, FOLDER / RECORD)
    for axis in WORDS:
        for ending in SHOWN:
            name = f"curves_{axis}.{ending}"
            shutil.copyfile(MEASURED / name, FOLDER / name)
    content = part(read_json(FOLDER / RECORD), FOLDER.name)
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")


if __name__ == "__main__":
    main()
