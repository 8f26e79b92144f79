"""The page in headless Chromium: run by test_in_browser.py with the environment that has gradio and playwright.

Nothing outside of this machine may be asked, by the page or by its server.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from vzip.demo.page.page import examples

ROOT = Path(__file__).resolve().parents[3]
WIDE, PHONE = (1280, 1000), (390, 844)
PATIENCE_MS = 60_000
# Put before the server's own code: every address that it looks up or connects to, a line each.
WATCH = """
import os, sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else args[0]
        if isinstance(address, (str, bytes)):
            with open(os.environ["ASKED"], "a") as file:
                print(address, file=file)
sys.addaudithook(hook)
"""


@dataclass
class Server:
    """The running page."""

    url: str
    temporary: Path
    asked: Path
    log: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "sitecustomize.py").write_text(WATCH)
    (folder / "temporary").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT / 'src'}",
        "TMPDIR": str(folder / "temporary"),
        "ASKED": str(folder / "asked.txt"),
        "OMP_NUM_THREADS": "1",
        "GRADIO_SHARE": "True",  # somebody's shell may say so
    }
    with (folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "vzip", "demo", "serve", "--port", str(port), "--max-new-tokens", "8"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        served = Server(
            f"http://127.0.0.1:{port}", folder / "temporary", folder / "asked.txt", folder / "log.txt", process
        )
        try:
            until(lambda: served.url in served.log.read_text() or process.poll() is not None, 300)
            assert process.poll() is None, served.log.read_text()
            yield served
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(server: Server, browser: Browser) -> Iterator[object]:
    """Opens the page as another visitor, at a width; in the end nothing outside was asked."""
    contexts, outside, errors = [], [], []

    def come(size: tuple[int, int] = WIDE) -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        contexts.append(context)

        def judge(route) -> None:
            if route.request.url.startswith((server.url, "data:", "blob:")):
                return route.continue_()
            outside.append(route.request.url)
            return route.abort()

        context.route("**/*", judge)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#ask")
        return page

    yield come
    for context in contexts:
        context.close()
    assert not outside and not errors


def until(happened, seconds: float = PATIENCE_MS / 1000) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def text(page: Page, selector: str) -> str:
    return page.locator(selector).inner_text()


def wait_for(page: Page, selector: str, said: str) -> None:
    page.wait_for_function(
        "([selector, said]) => document.querySelector(selector)?.innerText.includes(said)", arg=[selector, said]
    )


def upload(page: Page, path: Path) -> None:
    page.locator("#file input[type=file]").set_input_files(path)


def choose_example(page: Page, number: int) -> None:
    page.locator("#examples button").nth(number).click()
    page.wait_for_selector("#overlay img")


def ask(page: Page, question: str, turns: int = 1) -> tuple[str, str]:
    """Asks; returns both answers once their costs are there."""
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()
    for side in ("vanilla", "compressed"):
        wait_for(page, f"#{side}", question)
    wait_for(page, "#compressed-facts", "KV memory")
    until(lambda: "…" not in text(page, "#compressed"))
    page.wait_for_timeout(300)
    return tuple(text(page, f"#{side} .bot >> nth={turns - 1}").strip() for side in ("vanilla", "compressed"))


def click_patch(page: Page, row: int, col: int, grid: int = 24) -> None:
    """Clicks the middle of a patch where it is displayed, whatever the size of the widget around it."""
    page.wait_for_function("() => (document.querySelector('#seen img')?.naturalWidth ?? 0) > 0")
    page.locator("#seen img").scroll_into_view_if_needed()
    x, y, width, height = page.evaluate(
        """() => {
            const image = document.querySelector("#seen img"), box = image.getBoundingClientRect();
            const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
            const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
            return [box.x + (box.width - width) / 2, box.y + (box.height - height) / 2, width, height];
        }"""
    )
    page.mouse.click(x + (col + 0.5) * width / grid, y + (row + 0.5) * height / grid)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "a scene of mine.png"
    examples(2)[1].image.save(path)
    return path


def test_upload_ask_slide_several_turns(visit, server: Server, scene: Path) -> None:
    page = visit()
    upload(page, scene)
    page.wait_for_selector("#overlay img")
    assert not list(server.temporary.rglob("*mine*.png")), "it was read, and is gone"
    assert ask(page, "What word is written on the sign?") == ("exit", "exit")
    assert text(page, "#vanilla-facts").startswith("576 visual tokens · first token after ")
    assert text(page, "#compressed-facts").startswith("64 visual tokens (11 %) · first token after ")
    before = page.locator("#overlay img").get_attribute("src")
    page.locator("#tokens input[type=number]").fill("16")
    page.locator("#tokens input[type=number]").press("Enter")
    wait_for(page, "#compressed-facts", "16 visual tokens (3 %)")
    assert page.locator("#overlay img").get_attribute("src") != before
    assert text(page, "#vanilla-facts").startswith("576 ")
    until(lambda: "KV memory" in text(page, "#compressed-facts"))
    ask(page, "Is there a star in the picture?", turns=2)
    assert page.locator("#vanilla .user").count() == page.locator("#compressed .user").count() == 2
    page.locator("#anew").click()
    until(lambda: page.locator("#vanilla .user").count() == 0)


def test_the_slider_itself_and_another_method(visit) -> None:
    page = visit()
    choose_example(page, 0)
    ask(page, "Is there a cross in the picture?")
    slider = page.locator("#tokens input[type=range]")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    wait_for(page, "#compressed-facts", "112 visual tokens")
    before = page.locator("#overlay img").get_attribute("src")
    page.locator("#method input").click()
    page.get_by_role("option", name="divprune").click()
    until(lambda: page.locator("#overlay img").get_attribute("src") != before)
    wait_for(page, "#compressed-facts", "112 visual tokens")


@pytest.mark.parametrize("size", [WIDE, PHONE, (700, 500)])
def test_a_click_finds_its_patch_at_every_size(visit, tmp_path: Path, size: tuple[int, int]) -> None:
    page = visit(size)
    oblong = tmp_path / "oblong.png"
    Image.radial_gradient("L").resize((900, 300)).save(oblong)
    upload(page, oblong)
    page.wait_for_selector("#seen img")
    for row, col in ((0, 0), (0, 23), (7, 3), (12, 12), (23, 0), (23, 23)):
        click_patch(page, row, col)
        wait_for(page, "#caption", f"Patch {row + 1}, {col + 1} (row, column)")
    click_patch(page, 23, 23)
    wait_for(page, "#caption", "as the vision tower sees it")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing stands out to the side"


def test_what_is_wrong_is_a_sentence_and_the_page_goes_on(visit, server: Server, tmp_path: Path) -> None:
    page = visit()
    page.locator("#question textarea").fill("What is it?")
    page.locator("#ask").click()
    wait_for(page, "#status", "Nothing is open to ask about: drop a file, or choose an example.")
    (wrong := tmp_path / "wrong.png").write_text("<script>document.title = 'harmed'</script>")
    upload(page, wrong)
    wait_for(page, "#status", "wrong.png: no image that can be read, and this model takes images only.")
    (large := tmp_path / "large.png").write_bytes(b"0")
    os.truncate(large, 70 * 2**20)
    upload(page, large)
    page.get_by_text(re.compile("exceeds|too large|maximum", re.IGNORECASE)).first.wait_for()
    choose_example(page, 0)
    page.locator("#question textarea").fill("why " * 300)
    page.locator("#ask").click()
    wait_for(page, "#status", "1,200 characters, and 1,000 are allowed")
    ask(page, "Is there a <b>cross</b> in the picture?")
    assert "<b>cross</b>" in text(page, "#vanilla") and page.title() != "harmed"
    assert "Traceback" not in page.content() and "Traceback" not in server.log.read_text()


def test_two_visitors_at_once(visit) -> None:
    pages, signs = [visit(), visit(PHONE)], []
    for number, page in enumerate(pages):
        choose_example(page, number)
        page.locator("#question textarea").fill("What word is written on the sign?")
    for page in pages:
        page.locator("#ask").click()
    for page in pages:
        wait_for(page, "#compressed-facts", "KV memory")
        signs.append(text(page, "#vanilla .bot").strip())
    assert signs == ["music", "exit"]


def test_it_asks_nobody_else_and_leaves_nothing_behind(server: Server) -> None:
    """The last: it ends the server."""
    asked = set(server.asked.read_text().split())
    assert asked <= {"127.0.0.1", "localhost", "::1", "0.0.0.0"}, asked
    assert list(server.temporary.iterdir()), "what it makes is here"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert "uploads are deleted" in server.log.read_text() and not list(server.temporary.glob("vzip-page-*"))
