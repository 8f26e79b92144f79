"""One process at a time writes a directory, however the one before it ended."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vzip.errors import RunExistsError
from vzip.results import owner
from vzip.results.owner import OWNER_NAME, RunInUseError, check_free, owning

HOLDER = """
import sys, time
from pathlib import Path
from vzip.results.owner import owning
with owning(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns a directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_of_the_first(holder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for place in (tmp_path / "run", tmp_path / "link"):
        for act in (check_free, lambda place: owning(place).__enter__()):
            with pytest.raises(RunInUseError, match=rf"process {holder.pid} on .* name another with paths.run_dir=DIR"):
                act(place)
    assert issubclass(RunInUseError, RunExistsError)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_one_that_was_killed_leaves_nothing_that_blocks(holder, tmp_path, end):
    holder.send_signal(end)
    holder.wait()
    with owning(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / OWNER_NAME).read_text())["pid"] == os.getpid()


def test_the_next_one_waits_where_it_is_told_to(holder, tmp_path):
    threading.Timer(0.5, holder.kill).start()
    started = time.monotonic()
    with owning(tmp_path / "run", wait=True):
        assert time.monotonic() - started > 0.4


def test_what_was_made_for_it_goes_again_if_it_stays_empty(tmp_path):
    with owning(tmp_path / "a" / "b"), owning(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / OWNER_NAME).exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError), owning(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("x")
        raise ValueError
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
    check_free(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_another_thread_is_another_owner(tmp_path):
    refused = []

    def other():
        try:
            check_free(tmp_path)
        except RunInUseError as error:
            refused.append(error)

    with owning(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused


def test_a_forked_reader_does_not_keep_it(tmp_path):
    context = multiprocessing.get_context("fork")
    with owning(tmp_path):
        child = context.Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
    with owning(tmp_path):
        pass
    child.kill()
    child.join()


def test_of_the_processes_of_a_run_the_first_owns_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with owning(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with caplog.at_level("WARNING", logger=owner.__name__), owning(tmp_path):
        pass
    assert "has no locks (No locks available)" in caplog.text


def test_an_owner_of_another_machine_is_named(tmp_path, caplog):
    (tmp_path / OWNER_NAME).write_text('{"pid": 7, "host": "elsewhere", "since": "then"}')
    with caplog.at_level("WARNING", logger=owner.__name__), owning(tmp_path):
        pass
    assert "process 7 on elsewhere (since then)" in caplog.text
