"""Rasterises the letters that scenes are written with: DejaVu fonts (as matplotlib ships them) to one PNG atlas.

The atlas is shipped, not the fonts' rendering, because FreeType's output changes between releases and the benchmark has
to be the same image on every machine.

    python scripts/tiny/make_glyphs.py src/vzip/demo/glyphs.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from vzip.demo.render import CELL, CHARACTERS

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold")


def main() -> None:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    atlas = Image.new("L", (CELL * len(CHARACTERS), CELL * len(FONTS)))
    draw = ImageDraw.Draw(atlas)
    for row, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 56, layout_engine=ImageFont.Layout.BASIC)
        for column, character in enumerate(CHARACTERS):
            # "ls": left, baseline. Capitals and digits stand on the baseline, but Q's tail needs room below it.
            draw.text((column * CELL + 6, row * CELL + 50), character, fill=255, font=font, anchor="ls")
    atlas.save(sys.argv[1], optimize=True)


if __name__ == "__main__":
    main()
