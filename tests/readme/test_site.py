"""`make docs`: the pages build without a warning, ask no other host, and every link among them leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from tests.readme.shown import ROOT

import vzip

# What a browser fetches by itself, and what it follows when it is clicked on.
FETCHED = {("script", "src"), ("img", "src"), ("img", "srcset"), ("iframe", "src"), ("source", "src"), ("video", "src")}
FETCHED |= {("audio", "src"), ("embed", "src"), ("object", "data"), ("input", "src"), ("link", "href")}
NOT_FETCHED = {"canonical", "next", "prev", "edit", "license", "author"}  # rel of <link>


class Page(HTMLParser):
    """What a page fetches, links to and can be linked to in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and set(given.get("rel", "").split()) <= NOT_FETCHED:
            return
        self.fetched += [value for name, value in given.items() if (tag, name) in FETCHED]
        self.fetched += in_css(given.get("style", ""))


def in_css(text: str) -> list[str]:
    """What a style sheet fetches."""
    return [
        found
        for pair in re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
        for found in pair
        if found
    ]


def is_outside(address: str) -> bool:
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme not in ("", "data")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # As `make docs`, elsewhere; strict, so a warning ends it. A proxy that nobody is at: what asks outside fails.
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


@pytest.mark.whole
def test_no_page_asks_another_host(site: Path, pages: dict[Path, Page]) -> None:
    outside = {f"{path.name}: {asked}" for path, page in pages.items() for asked in page.fetched if is_outside(asked)}
    for path in site.rglob("*.css"):
        outside |= {f"{path.name}: {asked}" for asked in in_css(path.read_text("utf-8")) if is_outside(asked)}
    assert len(pages) > 20 and not outside


@pytest.mark.whole
def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    gone = []
    for path, page in pages.items():
        if path.name == "404.html":  # served from any address, so its links begin at the root
            continue
        for link in [*page.links, *page.fetched]:
            if is_outside(link) or link.startswith("data:"):
                continue
            parts = urlsplit(urljoin(path.as_uri(), link))
            target = Path(unquote(parts.path))
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                gone.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                gone.append(f"{path.relative_to(site)}: {link} (no such place)")
    assert not gone


@pytest.mark.whole
def test_the_api_pages_have_every_public_name(site: Path, pages: dict[Path, Page]) -> None:
    places = set().union(*(page.places for path, page in pages.items() if path.parent.name == "api"))
    documented = {place.rsplit(".", 1)[-1] for place in places if place.startswith("vzip.")}
    assert not set(vzip.__all__) - documented


def test_every_page_is_in_the_menu() -> None:
    """Of what is in docs/; mkdocs itself refuses a menu's entry that is nowhere."""

    def entries(menu: object) -> list[str]:
        if isinstance(menu, dict):
            return [name for value in menu.values() for name in entries(value)]
        return [name for value in menu for name in entries(value)] if isinstance(menu, list) else [str(menu)]

    nav = re.search(r"^nav:\n(?:[ ].*\n)+", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert nav is not None
    shown = set(entries(yaml.safe_load(nav[0])["nav"]))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    there |= {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert there | {"index.md", "contributing.md", "changelog.md"} == shown


def test_what_is_fetched_is_told_from_what_is_linked_to() -> None:
    page = Page(
        '<a href="https://a.org">a</a><script src="https://b.org/x.js"></script><link rel="canonical" href="https://c.org">'
        '<link rel="stylesheet" href="//d.org/x.css"><p id="here" style="background: url(https://e.org/x.png)">'
    )
    assert page.links == ["https://a.org"] and page.places == {"here"}
    assert page.fetched == ["https://b.org/x.js", "//d.org/x.css", "https://e.org/x.png"]
    assert all(map(is_outside, page.fetched)) and not is_outside("assets/x.js") and not is_outside("data:image/png,x")
    assert in_css("@import 'https://f.org/x.css'; a {b: url(\"y.png\")}") == ["https://f.org/x.css", "y.png"]
