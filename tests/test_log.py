"""An interruption is one line and exit code 130."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vzip import log


def interrupted(*kept: str) -> KeyboardInterrupt:
    """What comes out of contexts that say these things, the inner first."""
    try:
        if not kept:
            raise KeyboardInterrupt
        with log.keeping(lambda: kept[-1]):
            raise interrupted(*kept[:-1])
    except KeyboardInterrupt as error:
        return error


def test_the_innermost_context_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert log.tell_interruption(interrupted("8 of 80 answers are kept in a", "some")) == 130
    assert capsys.readouterr().err == "interrupted: 8 of 80 answers are kept in a. The same command continues.\n"


def test_where_nothing_is_kept_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert log.tell_interruption(KeyboardInterrupt()) == 130
    told = capsys.readouterr().err
    assert told == "interrupted: nothing new is kept, nothing old is lost. The same command begins anew.\n"


def test_of_several_processes_one_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert log.tell_interruption(KeyboardInterrupt("")) == 130, "the processes it started have said it"
    monkeypatch.setenv("RANK", "1")
    assert log.tell_interruption(interrupted("8 answers are kept")) == 130
    assert capsys.readouterr().err == ""


def test_what_libraries_say_about_one_another_is_kept_back() -> None:
    code = """
import logging, sys, warnings
from vzip import log
log.setup()
hint = logging.getLogger("transformers.utils.import_utils")
hint.addHandler(logging.StreamHandler())
hint.warning("`CLIPImageProcessor` requires torchvision (not installed); falling back")
hint.warning("a real warning")
warnings.warn_explicit("old", FutureWarning, "c10d_logger.py", 83, module="torch.distributed.c10d_logger")
warnings.warn_explicit("old too", FutureWarning, "mine.py", 1, module="mine")
from transformers.utils.logging import is_progress_bar_enabled
print("bars:", is_progress_bar_enabled(), file=sys.stderr)
"""
    plain = {**os.environ, "PYTHONWARNINGS": "", "HF_HUB_DISABLE_PROGRESS_BARS": ""}
    plain = {name: value for name, value in plain.items() if value}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, check=True).stderr
    assert "torchvision" not in told and "a real warning" in told
    assert "c10d_logger" not in told and "old too" in told
    assert "bars: False" in told, "standard error is no terminal here"
