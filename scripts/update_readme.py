"""Puts the table and figures of the last `make demo` into docs/first-hour.md, and a part of the table into README.md.

make demo && .venv/bin/python scripts/update_readme.py
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "runs" / "demo"
PAGE, README = ROOT / "docs" / "first-hour.md", ROOT / "README.md"
COLUMNS = ("tokens", "method", "average", "retention [95 %]", "prefill", "KV KiB")
ROWS = {("576", "vanilla"), *((tokens, "VisionZip") for tokens in ("192", "128", "64", "32")), ("64", "random")}


def short(table: str) -> str:
    """The columns and rows of the demo's table that README shows."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    places = [lines[0].index(name) for name in COLUMNS]
    kept = [line for line in lines if line in lines[:2] or tuple(line[:2]) in ROWS]
    return "\n".join(f"| {' | '.join(line[place] for place in places)} |" for line in kept)


def table_in(text: str, name: str = "demo table") -> str:
    """The table that stands between a page's marks."""
    return _marked(name).findall(text)[0][1].strip()


def put(text: str, table: str, name: str = "demo table") -> str:
    """A page with another table between its marks."""
    text, count = _marked(name).subn(lambda m: f"{m[1]}\n{table.strip()}\n\n{m[3]}", text)
    if count != 1:
        raise SystemExit(f"{count} places for the {name}; exactly one is expected")
    return text


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: .*? -->\n)(.*?)(<!-- end of {name} -->)", re.DOTALL)


def main() -> None:
    table = (DEMO / "table.md").read_text(encoding="utf-8")
    for page, name, shown in ((PAGE, "demo table", table), (README, "short demo table", short(table))):
        page.write_text(put(page.read_text(encoding="utf-8"), shown, name), encoding="utf-8")
    for name in ("retention.png", "overlay.png"):
        shutil.copyfile(DEMO / name, ROOT / "docs" / name)


if __name__ == "__main__":
    main()
