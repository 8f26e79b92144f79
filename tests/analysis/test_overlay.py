"""What an overlay draws: which pixels are faded, which lines stand around which patches, what is written."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

from vzip.analysis.overlay import (
    DIMMED,
    GROUP_COLORS,
    KEPT_COLOR,
    MAX_CROPS,
    OTHER_COLOR,
    TINT,
    Crop,
    Sheet,
    Words,
    as_image,
    draw_overlay,
    kept_pixels,
    merged_pixels,
    outline,
    wrapped,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 35, 3), dtype=np.uint8)  # sides that cells do not divide
KEPT = np.array([[True, False, False, True], [False, False, False, False], [False, True, False, False]])
# Patches that are kept merge into nothing, nor does the last one, which is dropped; group 1 is the largest.
GROUP = np.array([[-1, 0, 1, -1], [1, 1, 2, 1], [0, -1, 1, -1]])
TARGETS = [1, 4, 6]
WORDS = Words("model, method", "5 of 12 visual tokens", "What $is$ it?", "a_1 $x$", ["a note"])


def crop(group: np.ndarray = GROUP, targets: list[int] = TARGETS, kept: np.ndarray = KEPT) -> Crop:
    return Crop(Image.fromarray(PIXELS), kept, group, targets)


def test_pixels_are_faded_just_where_a_patch_is_not_kept() -> None:
    drawn = kept_pixels(crop())
    for y in range(20):
        for x in range(35):
            r, g, b = PIXELS[y, x].astype(float)
            faded = round(DIMMED * (0.299 * r + 0.587 * g + 0.114 * b) + (1 - DIMMED) * 255)
            expected = PIXELS[y, x] if KEPT[y * 3 // 20, x * 4 // 35] else (faded,) * 3
            assert tuple(drawn[y, x]) == tuple(expected), (y, x)


def test_groups_have_the_colour_of_their_target_and_the_rest_is_white() -> None:
    drawn, own = merged_pixels(crop()), crop()
    assert own.colors == [GROUP_COLORS[1], GROUP_COLORS[0], GROUP_COLORS[2]], "the largest first"
    for y, x in ((2, 12), (2, 30), (10, 3), (10, 20), (19, 33)):
        group = GROUP[y * 3 // 20, x * 4 // 35]
        grey = DIMMED * (PIXELS[y, x] @ (0.299, 0.587, 0.114)) + (1 - DIMMED) * 255
        color = 255 * np.array(to_rgb(own.colors[group]))
        expected = (255,) * 3 if group < 0 else np.round((1 - TINT) * grey + TINT * color)
        assert tuple(drawn[y, x]) == tuple(expected), (y, x)


def test_an_outline_is_the_edges_to_cells_outside() -> None:
    mask = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0]], bool)
    expected = set()
    for y, x in zip(*np.nonzero(mask), strict=True):
        for dy, dx, line in ((-1, 0, (0, 0, 1, 0)), (1, 0, (0, 1, 1, 1)), (0, -1, (0, 0, 0, 1)), (0, 1, (1, 0, 1, 1))):
            inside = 0 <= y + dy < 3 and 0 <= x + dx < 3 and mask[y + dy, x + dx]
            if not inside:
                expected.add((x + line[0], y + line[1], x + line[2], y + line[3]))
    assert {tuple(line.flatten()) for line in outline(mask)} == expected and len(outline(mask)) == len(expected)
    (near,) = (line for line in outline(np.ones((1, 1), bool), 0.25) if line[0, 1] == line[1, 1] == 0.25)
    assert near[:, 0].tolist() == [0, 1]


def test_lines_and_marks_in_both_panels() -> None:
    figure = draw_overlay([Sheet("", [crop()])], WORDS)
    left, right = figure.axes
    (frame,) = left.collections
    assert isinstance(frame, LineCollection) and len(frame.get_segments()) == len(outline(KEPT))
    assert tuple(frame.get_colors()[0][:3]) == to_rgb(KEPT_COLOR)
    assert left.get_title(loc="left") == "3 of 12 patches kept"
    assert right.get_title(loc="left") == "8 patches merge into 3 tokens"
    assert np.array_equal(left.images[0].get_array(), kept_pixels(crop()))
    assert np.array_equal(right.images[0].get_array(), merged_pixels(crop()))
    marks = [patch for patch in right.patches if isinstance(patch, Rectangle) and patch.get_fill()]
    width, height = 35 / 4, 20 / 3
    for group, (mark, lines) in enumerate(zip(marks, right.collections, strict=True)):
        color = to_rgb(crop().colors[group])
        assert tuple(mark.get_facecolor()[:3]) == tuple(lines.get_colors()[0][:3]) == color, "outline and target agree"
        assert mark.get_xy() == pytest.approx((TARGETS[group] % 4 * width - 0.5, TARGETS[group] // 4 * height - 0.5))
        assert len(lines.get_segments()) == len(outline(group == GROUP))


def test_what_is_written_is_in_the_figure_as_plain_text() -> None:
    figure = draw_overlay([Sheet("", [crop()])], WORDS)
    assert [text.get_text() for text in figure.texts] == [
        "model, method",
        "5 of 12 visual tokens",
        "a note",
        "Question: What $is$ it?",
        "Answer: a_1 $x$",
    ]
    assert not any(text.get_parse_math() for text in figure.texts)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "kept: a token of its own",
        "faded: not kept",
        "largest groups: target, what joins it",
    ]
    as_image(figure)
    bottom = min(text.get_window_extent().y0 for text in figure.texts)
    for axes in figure.axes:
        assert axes.title.get_window_extent().y1 <= bottom and axes.get_window_extent().y0 >= (
            legend.get_window_extent().y0
        )


def test_a_method_that_merges_nothing_has_one_panel_and_one_that_keeps_all_no_legend() -> None:
    nothing = np.full((3, 4), -1)
    figure = draw_overlay([Sheet("", [crop(nothing, [])])], Words("random"))
    assert len(figure.axes) == 1 and len(figure.legends[0].get_texts()) == 2 and len(figure.texts) == 1
    figure = draw_overlay([Sheet("", [crop(nothing, [], np.ones((3, 4), bool))])], Words("vanilla"))
    assert figure.axes[0].get_title(loc="left") == "all 12 patches are kept"
    assert not figure.legends and not figure.axes[0].collections


def test_only_the_largest_groups_have_colours() -> None:
    group = np.array([[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 6]])
    figure = draw_overlay([Sheet("", [crop(group, [0, 2, 4, 6, 8, 10, 11], np.zeros((3, 4), bool))])], Words("m"))
    own = crop(group, [0, 2, 4, 6, 8, 10, 11])
    assert own.colors == [*GROUP_COLORS, OTHER_COLOR, OTHER_COLOR]
    assert len(figure.axes[1].collections) == 5, "the rest is quiet: marked, without lines"
    assert merged_pixels(own)[19, 33].tolist() == [merged_pixels(own)[19, 33, 0]] * 3, "grey"
    assert "target of a smaller group (white: no group)" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_crops_stand_in_rows_and_a_long_video_is_thinned() -> None:
    figure = draw_overlay([Sheet("4 tiles", [crop()] * 4, 2), Sheet("20 frames", [crop()] * 20, 4)], Words("m"))
    tiles, _, frames, _ = figure.axes
    gap = 2
    pixels = tiles.images[0].get_array()
    assert pixels.shape == (40 + gap, 70 + gap, 3)
    for y, x in ((0, 0), (0, 37), (22, 0), (22, 37)):
        assert np.array_equal(pixels[y : y + 20, x : x + 35], kept_pixels(crop()))
    assert (pixels[20:22] == 255).all() and (pixels[:, 35:37] == 255).all()
    starts = {
        tuple(lines.get_segments()[0][0] - figure.axes[0].collections[0].get_segments()[0][0])
        for lines in tiles.collections
    }
    assert starts == {(0, 0), (37, 0), (0, 22), (37, 22)}
    assert len(frames.collections) == MAX_CROPS
    assert frames.get_title(loc="left") == f"20 frames ({MAX_CROPS} of 20 drawn): 60 of 240 patches kept"


def test_long_text_is_broken_to_the_width() -> None:
    measure = len
    assert wrapped("one two three", 7, measure) == ["one two", "three"]
    assert wrapped("one\ntwo", 7, measure) == ["one", "two"]
    assert wrapped("abcdefghij kl", 4, measure) == ["abcd", "efgh", "ij", "kl"], "a word without a space to break at"
    assert wrapped("a b c d e f", 1, measure, most=2)[0] == "a"
    shortened = wrapped("aaaa bbbb cccc dddd", 9, measure, most=1)
    assert shortened == ["aaaa ..."] or (shortened[0].endswith("...") and len(shortened[0]) <= 9)
    figure = draw_overlay([Sheet("", [crop()])], Words("m", question="What is this? " * 40))
    as_image(figure)
    (question,) = (text for text in figure.texts if text.get_text().startswith("Question"))
    assert question.get_text().count("\n") >= 2
    assert question.get_window_extent().x1 <= figure.bbox.width


def test_an_answer_in_a_script_without_glyphs_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    assert as_image(draw_overlay([Sheet("", [crop()])], Words("m", answer="答案"))).mode == "RGB"
    assert not recwarn.list
