"""Figure 7's numbers, from answers made by hand."""

from __future__ import annotations

from vzip.report.figures.figure_7 import Asked, draw, shares


def asked(method: str, image: str, alone: str, after: str, reference: str | None = "blue") -> Asked:
    return Asked(method, image, "What is worn?", "What color is it?", reference, "a shirt", alone, after, 64, 64.0)


def test_right_and_as_vanilla_alone_and_after_another_question() -> None:
    all_asked = [
        asked("vanilla", "a", "blue", "blue"),
        asked("text", "a", "Blue.", "red"),
        asked("vanilla", "b", "blue", "red"),
        asked("text", "b", "green", "red"),
    ]
    right, same = shares(all_asked, "text", True), shares(all_asked, "text", False)
    assert right["alone"].tolist() == [1, 0] and right["second"].tolist() == [0, 0]
    assert same["alone"].tolist() == [1, 0] and same["second"].tolist() == [0, 1]
    drawing = draw(all_asked, "m")
    assert "text: right 50.0 % alone, 0.0 % second; difference -50.0" in drawing.caption
    assert "text: as vanilla in the same place 50.0 % alone, 50.0 % second" in drawing.caption
    right_panel, vanilla_panel = drawing.figure.axes
    assert [bar.get_height() for bar in right_panel.patches] == [100, 50, 50, 0]
    assert len(vanilla_panel.patches) == 2 and drawing.rows[1]["after"] == "red"


def test_without_references_only_vanilla_is_held_against() -> None:
    drawing = draw([asked("vanilla", "a", "x", "y", None), asked("text", "a", "x", "z", None)], "m")
    assert len(drawing.figure.axes) == 1 and "right" not in drawing.caption.splitlines()[-1]
