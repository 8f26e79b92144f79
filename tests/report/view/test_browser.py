"""The page in Chromium, with real keys: `make test-all` installs the browser (make browser)."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.report.view.chromium import Chromium
from tests.report.view.view_runs import COMPRESSED, VANILLA, put, row

from vzip import cli

pytestmark = pytest.mark.whole

SCENE = Path(__file__).resolve().parents[3] / "docs" / "scene.png"
NASTY = (
    "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'><!-- \" ' & \u2028 {{data}} \\u003c"
)
NUM = 2000
OURS, THEIRS = (random.Random(seed).choices([True, False], k=NUM) for seed in (1, 2))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 questions of two tasks, the first about an image."""
    folder = tmp_path_factory.mktemp("view")
    tasks = ["made_up", "another"]
    runs = [
        put(folder / name, words, [row(n, right, task=tasks[n % 2]) for n, right in enumerate(answers)])
        for name, words, answers in (("ours", COMPRESSED, OURS), ("theirs", VANILLA, THEIRS))
    ]
    lost = next(n for n in range(NUM) if THEIRS[n] and not OURS[n])
    images = folder / "images"
    images.mkdir()
    shutil.copy(SCENE, images / f"{lost}.png")
    out = folder / "view.html"
    assert cli.main(["view", *map(str, runs), "--out", str(out), "--images", str(images), "--limit", "3"]) == 0
    return out


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path / "profile") as browser:
        yield browser
        assert browser.complaints() == []


def num(browser: Chromium, selector: str) -> int:
    return browser.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_of_2000_questions_those_are_drawn_that_are_seen(page: Path, browser: Chromium) -> None:
    browser.open(page)
    assert browser.text("#count") == "2,000 questions"
    assert 0 < num(browser, ".row") < 60 and num(browser, "*") < 800
    height = browser.run("document.getElementById('spacer').clientHeight")
    assert height >= NUM * 40
    browser.run("document.getElementById('list').scrollTop = 1e9")
    browser.wait("document.querySelector('.row:last-of-type').textContent.includes('Question 1999')")
    assert num(browser, ".row") < 60 and num(browser, "*") < 800


def test_keys_walk_filter_search_and_tell(page: Path, browser: Chromium) -> None:
    browser.open(page)
    browser.key("1")
    lost = [n for n in range(NUM) if THEIRS[n] and not OURS[n]]
    in_order = [n for n in lost if n % 2 == 0] + [n for n in lost if n % 2]  # task by task
    assert browser.text("#count") == f"{len(lost)} (of 2,000) questions"
    browser.key("j", "j", "ArrowDown", "k")
    assert browser.text("#detail h2") == f"Question {in_order[1]}: what is it?"
    assert browser.text("#count").startswith("2 of ")
    assert browser.text(".answer-0 .answer") == f"something else {in_order[1]}"
    assert browser.text(".answer-1 .answer") == f"target {in_order[1]}" == browser.text("#detail dd.target")
    browser.key(*"j" * 40)
    assert browser.text("#detail h2") == f"Question {in_order[41]}: what is it?"
    selected = "document.querySelector('.row[aria-selected=true]').getBoundingClientRect()"
    frame = "document.getElementById('list').getBoundingClientRect()"
    assert browser.run(f"{selected}.top >= {frame}.top - 1 && {selected}.bottom <= {frame}.bottom + 1")

    browser.key("0", "/", *"ELSE 17j?")  # letters go into the field, whatever they mean outside
    assert browser.run("document.getElementById('search').value") == "ELSE 17j?"
    assert browser.text("#count") == "0 (of 2,000) questions" and num(browser, ".empty") == 1
    browser.key("Escape", "x")
    assert browser.text("#count").endswith("2,000 questions")
    browser.key("2")
    gained = sum(a and not b for a, b in zip(OURS, THEIRS, strict=True))
    assert f"{gained} (of 2,000)" in browser.text("#count")
    browser.key("?")
    assert browser.run("document.getElementById('help').open") and "next question" in browser.text("#help")
    browser.key("Escape", "s")
    assert not browser.run("document.getElementById('scores').hidden")
    lines = browser.run(
        "[...document.querySelectorAll('#scores tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert [line[0] for line in lines] == [
        "made_up (accuracy)", "colour", "count", "shape", "another (accuracy)", "colour", "count", "shape"
    ]  # fmt: skip
    evens = range(0, NUM, 2)
    assert lines[0][1] == "1,000" and lines[0][6] == str(sum(THEIRS[n] and not OURS[n] for n in evens))


def test_selects_and_lengths_filter(page: Path, browser: Chromium) -> None:
    browser.open(page)
    for name, value in (("task", "another"), ("category", "shape")):
        browser.run(
            f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('change')) }})(document.getElementById('{name}'))"
        )
    chosen = [n for n in range(1, NUM, 2) if n % 3 == 1]
    assert browser.text("#count") == f"{len(chosen)} (of 2,000) questions"
    short = [n for n in chosen if len(f"Question {n}: what is it?") <= 24]
    browser.run("document.getElementById('more').open = true")
    browser.click("#qmax")
    browser.key("2", "4")
    assert browser.text("#count") == f"{len(short)} (of 2,000) questions"
    browser.click("#clear")
    assert browser.text("#count") == "2,000 questions"


def test_a_link_opens_the_same_question_with_the_same_filters(page: Path, browser: Chromium) -> None:
    browser.open(page)
    browser.key("1", "j", "j", "j", "o")
    question, count = browser.text("#detail h2"), browser.text("#count")
    browser.wait("location.hash.includes('f=lost') && location.hash.includes('o=groups')")
    fragment = browser.run("location.hash")
    browser.open(page, fragment)
    assert (browser.text("#detail h2"), browser.text("#count")) == (question, count)
    assert browser.run("document.querySelector('#outcomes [aria-pressed=true]').value") == "lost"
    for wrong in ("#s=gone:1", "#f=nonsense&o=none&qmin=x", "#%"):
        browser.open(page, wrong)
        assert "2,000" in browser.text("#count")


def test_kept_patches_and_merge_groups_are_drawn_from_numbers(page: Path, browser: Chromium) -> None:
    browser.open(page)
    browser.key("1", "j")
    browser.wait("document.querySelector('.picture img').complete")
    assert browser.run("document.querySelector('.picture img').naturalWidth") == 336
    count = "(document.querySelector({}).getAttribute('d').match(/M/g) || []).length"
    kept = browser.run(count.format("'.frame'"))
    assert browser.run(count.format("'.dim'")) + kept == 576
    assert f"{kept} of 576 patches kept" in browser.text("figcaption")
    browser.key("o")
    assert num(browser, ".tint") == 5 == browser.run(count.format("'.edge'"))
    merged = browser.run("[...document.querySelectorAll('.tint')].flatMap(p => p.getAttribute('d').match(/M/g)).length")
    assert merged + kept + browser.run(count.format("'.dim'")) == 576
    browser.click("#overlays button:nth-child(3)")
    assert num(browser, ".picture svg") == 0 and num(browser, ".picture img") == 1
    assert browser.run("document.querySelectorAll('canvas, iframe, link').length") == 0


def test_a_phone_shows_the_list_then_the_question_and_never_scrolls_sideways(page: Path, tmp_path: Path) -> None:
    with Chromium(tmp_path / "profile", 390, 844, dark=True) as browser:
        browser.open(page)
        visible = "getComputedStyle(document.querySelector({})).display !== 'none'"
        assert browser.run(visible.format("'#list'")) and not browser.run(visible.format("'#detail'"))
        browser.click(".row:nth-child(2)")
        assert browser.run(visible.format("'#detail'")) and not browser.run(visible.format("'#list'"))
        first = browser.text("#detail h2")
        browser.click("#next")
        assert browser.text("#detail h2") != first
        for key in ("", "s"):
            browser.key(*key)
            assert browser.run("document.documentElement.scrollWidth") <= 390
        browser.click("#back")
        assert browser.run("document.querySelector('#scores td').clientWidth") > 100
        assert browser.run(visible.format("'#list'"))
        dark = browser.run("getComputedStyle(document.body).backgroundColor")
        assert sum(int(part) for part in dark[4:-1].split(",")) < 3 * 60
        assert browser.complaints() == []


def test_texts_of_data_and_models_are_shown_and_never_run(tmp_path: Path, browser: Chromium) -> None:
    change = {"question": NASTY, "target": NASTY, "group": NASTY, "question_id": NASTY}
    rows = [row(0, False, answer=NASTY, **change), row(1, True, answer="\ud800 half")]
    runs = [put(tmp_path / name, words, rows) for name, words in (("a", COMPRESSED), ("b", VANILLA))]
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(SCENE, images / "<script>window.ran = 3<!--'\".png")
    out = tmp_path / "view.html"
    assert cli.main(["view", *map(str, runs), "--out", str(out), "--images", str(images), "--no-kept"]) == 0
    browser.open(out)
    browser.key("j", "s")
    assert browser.text("#detail h2") == NASTY == browser.text(".answer-0 .answer") == browser.text("#detail dd.target")
    assert browser.run(f"[...document.querySelectorAll('#category option')].some(o => o.value === {json.dumps(NASTY)})")
    browser.wait("location.hash.includes('s=')")
    browser.open(out, browser.run("location.hash"))
    assert browser.text("#detail h2") == NASTY
    time.sleep(0.3)  # for what might run after a failed load of an image
    assert browser.run("window.ran === undefined") and num(browser, "script") == 2 and num(browser, "img") == 0
    # The page's own policy stands behind that: what is put into it by force does not run either.
    browser.run("document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.ran = 4\" id=forced>x</b>')")
    browser.run("document.getElementById('forced').click()")
    assert browser.run("window.ran === undefined")
    deadline = time.monotonic() + 60
    while not (told := browser.complaints()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "Content Security Policy" in str(told), "the policy reports it"
    browser.events.clear()
