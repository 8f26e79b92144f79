"""Puts the table and figures of the last `make demo` into README.md and docs/.

make demo && .venv/bin/python scripts/update_readme.py
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "runs" / "demo"
MARKED = re.compile(r"(<!-- demo table: .*? -->\n).*?(<!-- end of demo table -->)", re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    table = (DEMO / "table.md").read_text()
    text, count = MARKED.subn(lambda m: m[1] + "\n" + table + "\n" + m[2], readme.read_text())
    if count != 1:
        raise SystemExit(f"README.md has {count} places for the demo's table; exactly one is expected")
    (ROOT / "docs").mkdir(exist_ok=True)
    for name in ("retention.png", "overlay.png"):
        shutil.copyfile(DEMO / name, ROOT / "docs" / name)
    readme.write_text(text)


if __name__ == "__main__":
    main()
