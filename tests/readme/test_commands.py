"""Every command that README.md, CONTRIBUTING.md and docs show is tried, each as commands.yaml says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.readme.shown import PAGES, ROOT, TAGS, Entry, entries, shown_commands

ENTRIES = entries()


def test_every_command_shown_has_an_entry_and_every_entry_is_shown() -> None:
    shown = {command: page.name for page in PAGES for command in shown_commands(page.read_text(encoding="utf-8"))}
    listed = [entry.command for entry in ENTRIES]
    assert len(listed) == len(set(listed))
    assert not (untagged := [f"{page}: {command}" for command, page in shown.items() if command not in listed]), (
        untagged
    )
    assert not (gone := [command for command in listed if command not in shown]), gone


def test_every_entry_says_what_must_come() -> None:
    for entry in ENTRIES:
        assert entry.tag in TAGS, entry
        assert entry.says, entry
        assert (entry.exit != 0) == (entry.tag == "refuse"), entry


def test_commands_are_found_in_blocks_and_in_prose() -> None:
    page = "`make x` `vzip.ops` `python -m vzip\nruns`\n```bash\nmake y  # why\n\npython a.py \\\n  b=1\n```\n"
    assert shown_commands(page) == ["make y", "python a.py b=1", "make x", "python -m vzip runs"]


def test_placeholders_are_whole_words() -> None:
    entry = Entry("vzip judge RUN --run DIR/x", "run", where={"RUN": "runs/a", "DIR": "d"}, add="--yes")
    assert entry.line == "vzip judge runs/a --run d/x --yes"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout's own files, as a clone has them, with the environment that runs this test."""
    folder = tmp_path_factory.mktemp("clone") / "vzip"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def environment(checkout: Path) -> Mapping[str, str]:
    # A make below `make test-all` would speak as its child ("make[1]: Entering directory"), which no reader's does.
    return {
        **{name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")},
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout / "src"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }


@pytest.mark.whole
@pytest.mark.parametrize(
    "entry", [pytest.param(e, marks=pytest.mark.xdist_group(e.part), id=e.command[:80]) for e in ENTRIES]
)
def test_the_command_does_what_the_page_says(entry: Entry, checkout: Path, environment: Mapping[str, str]) -> None:
    """Those of a part one after the other, in one process: some use what earlier ones have written."""

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line],
            cwd=checkout,
            env=dict(environment),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=1500,
        )

    if entry.first:
        prepared = run(entry.first)
        assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    done = run(entry.line)
    printed = done.stdout + done.stderr
    assert done.returncode == entry.exit, f"{entry.line}\n{printed[-4000:]}"
    for text in entry.says:
        assert text in printed, f"{entry.line}\n{text!r} is not in:\n{printed[-4000:]}"
    assert "Traceback" not in printed, printed[-4000:]
