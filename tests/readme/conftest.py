"""A copy of the checkout in which the commands of a part of commands.yaml are tried."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.readme.shown import ROOT, Entry


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


@pytest.fixture(scope="module")
def tried(checkout: Path, environment: Mapping[str, str]) -> Callable[[Entry], None]:
    """Tries a command, as its entry says."""

    def attempt(entry: Entry) -> None:
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

    return attempt
