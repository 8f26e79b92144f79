"""docs/gallery.md shows every figure of docs/gallery, with its caption."""

from __future__ import annotations

from pathlib import Path

from scripts.update_gallery import FOLDER, PAGE, page


def test_the_page_is_what_the_folder_holds() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(FOLDER), "python scripts/update_gallery.py writes it anew"


def test_figures_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in ("10", "9", "2"):
        (tmp_path / f"figure_{number}.txt").write_text(f"Of {number} < 20 images.\nFound: {number}.\n")
    shown = page(tmp_path)
    assert [line for line in shown.splitlines() if line.startswith("## The paper's")] == [
        f"## The paper's Figure {number}" for number in (2, 9, 10)
    ]
    assert f"({tmp_path.name}/figure_9.csv)" in shown and "Of 9 &lt; 20 images. By `make gallery`" in shown
    assert "\n- Found: 9.\n" in shown


def test_every_picture_and_table_of_numbers_is_there() -> None:
    drawn = {path.stem for path in FOLDER.glob("figure_*.txt")}
    assert drawn == {f"figure_{number}" for number in (1, 2, *range(4, 15))}
    assert {path.stem for path in FOLDER.glob("*.webp")} == drawn == {path.stem for path in FOLDER.glob("*.csv")}
