"""Runs in_browser.py with the environment of the page, whose Gradio wants another Pillow than the tests' own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.whole
def test_the_page_in_a_browser() -> None:
    python = ROOT / ".venv-demo" / "bin" / "python"
    assert python.exists(), "make .venv-demo/.installed makes it; make test-all does"
    assert shutil.which("chromium"), "make browser installs it; make test-all does"
    tests = ["tests/demo/page/in_browser.py", "-m", "", "-n", "0", "-q", "--durations", "5", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTEST_ADDOPTS": ""}
    done = subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert "8 passed" in done.stdout and "skipped" not in done.stdout
